//! Kernels and disks of Debian guests for tests and benchmarks: those that yado itself fetches, verifies and builds.

use anyhow::Context;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A finished image in yado's cache, as its `image.json` describes it.
#[derive(Debug, Clone, Deserialize)]
pub struct Image {
    /// The raw disk.
    pub disk: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// The kernel command line.
    pub cmdline: String,
    /// Code name of the release.
    pub codename: String,
}

/// Where yado's cache is: under XDG_CACHE_HOME, else the home directory.
pub fn cache() -> PathBuf {
    let set = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    set.unwrap_or_else(home).join("yado/debian")
}

/// The kernel's own name for itself, as in `6.12.1+deb13-cloud-amd64`: the first word at `kernel_version` of the setup header
/// (Linux `boot.rst`).
pub fn release(kernel: &Path) -> Option<String> {
    let bytes = std::fs::read(kernel).ok()?;
    let place: [u8; 2] = bytes.get(0x20e..0x210)?.try_into().ok()?;
    let text = bytes.get(0x200 + usize::from(u16::from_le_bytes(place))..)?;
    let word = text.split(|byte| *byte == b' ' || *byte == 0).next()?;
    String::from_utf8(word.to_vec()).ok()
}

/// The image of `codename` with Debian's kernel for virtual machines that was used last.
pub fn cached(cache: &Path, codename: &str) -> Option<Image> {
    cached_with(cache, codename, |release| release.ends_with("-cloud-amd64"))
}

/// The image of `codename` with a kernel whose release is one of `these` that was used last: `yado run` notes its use in
/// the time of `image.json`.
pub fn cached_with(cache: &Path, codename: &str, these: impl Fn(&str) -> bool) -> Option<Image> {
    let images = std::fs::read_dir(cache.join("images")).ok()?.flatten();
    let mut found: Vec<_> = images
        .filter_map(|entry| {
            let description = entry.path().join("image.json");
            let image: Image = serde_json::from_slice(&std::fs::read(&description).ok()?).ok()?;
            let used = description.metadata().ok()?.modified().ok()?;
            let fits = image.codename == codename && these(&release(&image.kernel)?);
            fits.then_some((used, image))
        })
        .collect();
    found.sort_by_key(|(used, _)| *used);
    found.pop().map(|(_, image)| image)
}

/// The image of `codename` that `yado` itself boots; it makes it if it is not in the cache. Without a yado, the one that was
/// used last.
pub fn image(yado: &Path, cache: &Path, codename: &str) -> anyhow::Result<Image> {
    if yado.as_os_str().is_empty() {
        return cached(cache, codename)
            .with_context(|| format!("no image of {codename} in {}", cache.display()));
    }
    let status = Command::new(yado)
        .args(["run", &format!("debian:{codename}"), "--", "true"])
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {}", yado.display()))?;
    cached(cache, codename).with_context(|| {
        format!("`yado run debian:{codename} -- true` ({status}) left no image in {}", cache.display())
    })
}
