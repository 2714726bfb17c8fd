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

/// Whether this is Debian's kernel for virtual machines, not another flavour: its setup header says so.
fn is_cloud(kernel: &Path) -> bool {
    let flavour = b"-cloud-amd64 ";
    let bytes = std::fs::read(kernel).unwrap_or_default();
    let setup = bytes.get(..0x8000).unwrap_or_default();
    setup.windows(flavour.len()).any(|window| window == flavour)
}

/// The newest image of `codename` that is in the cache.
pub fn cached(cache: &Path, codename: &str) -> Option<Image> {
    let images = std::fs::read_dir(cache.join("images")).ok()?.flatten();
    let mut found: Vec<_> = images
        .filter_map(|entry| {
            let description = std::fs::read(entry.path().join("image.json")).ok()?;
            let image: Image = serde_json::from_slice(&description).ok()?;
            let made = entry.metadata().ok()?.modified().ok()?;
            (image.codename == codename && is_cloud(&image.kernel)).then_some((made, image))
        })
        .collect();
    found.sort_by_key(|(made, _)| *made);
    found.pop().map(|(_, image)| image)
}

/// The image of `codename`; `yado` makes it if it is not in the cache.
pub fn image(yado: &Path, cache: &Path, codename: &str) -> anyhow::Result<Image> {
    if let Some(image) = cached(cache, codename) {
        return Ok(image);
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
