//! What a guest boots from: a Debian image built or found in the cache, a kept guest's own disk, or given files.

use crate::arguments::{Flavour, Run};
use crate::cache;
use crate::exit::with_code;
use crate::progress::Phases;
use crate::registry::{self, Boot, Place};
use crate::signals;
use crate::size::Size;
use anyhow::Context;
use debian::prune::{self, Policy};
use debian::{Content, GuestFile, KernelFlavour, Phase};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// The root disk of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// No disk.
    None,
    /// An image that must not change: writes go to a private file that vanishes with the guest.
    Disposable(PathBuf),
    /// The guest's own disk.
    Own(PathBuf),
}

/// Everything the machine needs to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// For people: `debian:trixie`.
    pub label: String,
    pub boot: Boot,
    pub root: Root,
    /// The guest has yado's agent.
    pub agent: bool,
    /// A Debian guest that `yado run --name` can go on with.
    pub keeps: bool,
    /// The user's own kernel boots, not a Debian guest.
    pub direct: bool,
}

/// The first part of the names of guests without a name.
pub fn stem(options: &Run) -> &'static str {
    match options.guest.as_deref() {
        Some(guest) if guest == "debian" || guest.starts_with("debian:") => "debian",
        Some(_) => "disk",
        None => "kernel",
    }
}

/// Finds or builds what `options` names.
pub fn find(options: &Run, place: &Place, phases: &mut Phases) -> anyhow::Result<Source> {
    let disk = place.disk();
    if options.name.is_some()
        && let Some(record) = place.record()?
        && let Some(boot) = record.boot
        && disk.exists()
    {
        phases.say(&format!("{} goes on with its disk ({})", place.name, record.source));
        let guest = options.guest.as_deref();
        anyhow::ensure!(
            guest.is_none_or(|guest| guest.split(':').next() == Some("debian")),
            with_code(
                2,
                format!(
                    "the guest {} has a disk of its own already: `yado run debian --name {}` goes on with it",
                    place.name, place.name
                )
            )
        );
        let boot = Boot {
            kernel: options.kernel.clone().unwrap_or(boot.kernel),
            initrd: options.initrd.clone().map(PathBuf::from).or(boot.initrd),
            cmdline: command_line(&boot.cmdline, options),
        };
        return Ok(Source {
            label: record.source,
            boot,
            root: Root::Own(disk),
            agent: true,
            keeps: true,
            direct: false,
        });
    }
    let Some(guest) = options.guest.as_deref() else { return direct(options, Root::None) };
    match guest.split_once(':').unwrap_or((guest, "")) {
        ("debian", suite) => build_debian(suite, options, place, phases),
        _ => {
            let path = PathBuf::from(guest);
            let found = std::fs::metadata(&path);
            found.with_context(|| match registry::find(guest) {
                Ok(_) => format!("{guest} is the name of a guest: `yado run --name {guest}` starts it"),
                Err(_) => {
                    format!("{guest} is neither `debian`, `debian:SUITE` nor a disk image that can be read")
                }
            })?;
            anyhow::ensure!(
                options.kernel.is_some(),
                with_code(
                    2,
                    format!(
                        "{guest}: to boot from a disk's own boot loader needs firmware, which yado has not yet: give --kernel"
                    )
                )
            );
            direct(options, Root::Own(path))
        }
    }
}

fn direct(options: &Run, root: Root) -> anyhow::Result<Source> {
    let kernel = options.kernel.clone().context("no kernel: give --kernel FILE")?;
    let label =
        kernel.file_name().map_or_else(|| "kernel".into(), |name| name.to_string_lossy().into_owned());
    let boot = Boot {
        kernel: kernel.clone(),
        initrd: options.initrd.clone().map(PathBuf::from),
        cmdline: direct_command_line(&kernel, options.cmdline.as_deref().unwrap_or_default()),
    };
    // An initramfs may have brought the agent; commands are tried where the user asks for one.
    Ok(Source { label, boot, root, agent: !options.argv.is_empty(), keeps: false, direct: true })
}

/// How much of a kernel is looked at to tell whether it is Linux, in bytes.
const LOOK: u64 = 256 << 20;

/// The user's command line, with what Linux needs for yado to hear it: the serial console, and a reset after a panic,
/// which ends the run. What the user says of either counts.
fn direct_command_line(kernel: &Path, given: &str) -> String {
    let mut head = Vec::new();
    // A file that cannot be read is refused where it is loaded. A pipe is left to the loader, which reads it once.
    let regular = std::fs::metadata(kernel).is_ok_and(|about| about.is_file());
    let mut read = || File::open(kernel).and_then(|file| file.take(LOOK).read_to_end(&mut head));
    if !regular || read().is_err() || !machine::boot::is_linux(&head) {
        return given.to_owned();
    }
    let own = |name: &str| {
        let words = given.split_whitespace().take_while(|word| *word != "--");
        words.filter_map(|word| word.split_once('=')).any(|(key, _)| key == name)
    };
    let added = [("console", "console=ttyS0"), ("panic", "panic=-1")];
    let added = added.iter().filter(|(name, _)| !own(name)).map(|(_, word)| *word);
    added.chain(Some(given).filter(|given| !given.is_empty())).collect::<Vec<_>>().join(" ")
}

fn command_line(default: &str, options: &Run) -> String {
    match &options.cmdline {
        Some(more) => format!("{default} {more}"),
        None => default.to_owned(),
    }
}

fn build_debian(suite: &str, options: &Run, place: &Place, phases: &mut Phases) -> anyhow::Result<Source> {
    let mut request = debian::Request::new(cache::directory()?);
    request.suite = (!suite.is_empty()).then(|| suite.to_owned());
    request.mirrors.clone_from(&options.mirror);
    request.disk_size = options.disk_size.0;
    request.extra_packages.clone_from(&options.package);
    request.kernel_flavour = match options.flavour {
        Flavour::Cloud => KernelFlavour::Cloud,
        Flavour::Generic => KernelFlavour::Generic,
        Flavour::Rt => KernelFlavour::RealTime,
    };
    if options.refresh {
        request.index_age_max = Duration::ZERO;
    }
    request.files = agent_files();
    request.init = guest::AGENT.into();
    let image = match debian::build(&request, &mut Shown(phases), &signals::CANCELLED) {
        Ok(image) => image,
        Err(error) if error.is_stopped() => {
            return Err(with_code(signals::cancelled_code(), "cancelled; nothing was changed"));
        }
        Err(error) => return Err(error.into()),
    };
    phases.say(&format!(
        "image: Debian {} ({}), {} packages, {}{}",
        image.version,
        image.codename,
        image.packages,
        if image.cached { "cached" } else { "built" },
        if image.offline { "; the mirror cannot be reached, so it may be out of date" } else { "" }
    ));
    prune::mark_used(&image.disk);
    prune::clear_interrupted(&request.cache);
    if !image.cached {
        // What a newer image has replaced; the next build will try again if this fails.
        let _ = cache::remove(Policy::automatic(), &AtomicBool::new(true));
    }
    let keeps = options.name.is_some();
    let kept = |file: PathBuf| if keeps { keep(&file, &place.directory) } else { Ok(file) };
    let kernel = options.kernel.clone().map_or_else(|| kept(image.kernel), Ok)?;
    let initrd = match options.initrd.clone() {
        Some(given) => Some(given.into()),
        None => image.initrd.map(kept).transpose()?,
    };
    let root = if keeps {
        let disk = place.disk();
        anyhow::ensure!(
            !disk.exists(),
            "{disk} is there, but what is known of its guest is lost: move the disk away to keep it, then `yado rm {name}`",
            disk = disk.display(),
            name = place.name
        );
        copy(&image.disk, &disk, phases)?;
        Root::Own(disk)
    } else {
        Root::Disposable(image.disk)
    };
    let boot = Boot { kernel, initrd, cmdline: command_line(&image.cmdline, options) };
    Ok(Source { label: format!("debian:{}", image.codename), boot, root, agent: true, keeps, direct: false })
}

/// A kept guest's own kernel or initrd: its image may leave the cache before it does. Answers where it is.
fn keep(file: &Path, directory: &Path) -> anyhow::Result<PathBuf> {
    let name = file.file_name().with_context(|| format!("{}: not a file", file.display()))?;
    let to = directory.join(name);
    let _ = std::fs::remove_file(&to);
    std::fs::hard_link(file, &to)
        .or_else(|_| std::fs::copy(file, &to).map(|_| ()))
        .with_context(|| format!("cannot keep {} at {}", file.display(), to.display()))?;
    Ok(to)
}

/// The guest's own disk: a copy that shares blocks with the cache where the file system can.
fn copy(from: &std::path::Path, to: &std::path::Path, phases: &mut Phases) -> anyhow::Result<()> {
    let partial = to.with_extension("partial");
    // What a process that was killed has left.
    let _ = std::fs::remove_file(&partial);
    phases.begin("copying the disk", Some(std::fs::metadata(from)?.len()));
    let copied = image::clone_file(from, &partial, &mut |bytes| {
        phases.advance(bytes);
        !signals::cancelled()
    });
    phases.finish();
    let kept = copied.map_err(anyhow::Error::from).and_then(|()| Ok(std::fs::rename(&partial, to)?));
    let kept = kept.inspect_err(|_| {
        let _ = std::fs::remove_file(&partial);
    });
    if kept.is_err() && signals::cancelled() {
        return Err(with_code(signals::cancelled_code(), "cancelled; nothing was changed"));
    }
    kept.with_context(|| format!("cannot make the guest's disk {}", to.display()))
}

/// What yado adds to a guest: its agent, the unit that starts it, and no login prompt where nobody logs in.
fn agent_files() -> Vec<GuestFile> {
    let file = |path: &str, content| GuestFile { path: path.to_owned(), content };
    vec![
        file(guest::AGENT_PATH, Content::File(0o755, guest::AGENT.into())),
        file(guest::UNIT_PATH, Content::File(0o644, guest::UNIT.as_bytes().into())),
        file(guest::UNIT_WANT_PATH, Content::Link(guest::UNIT_PATH.to_owned())),
        // The virtio console carries the agent's port; nobody looks at /dev/hvc0, so no login prompt waits there.
        file("/etc/systemd/system/serial-getty@hvc0.service", Content::Link("/dev/null".to_owned())),
    ]
}

/// Shows a build's phases.
struct Shown<'a>(&'a mut Phases);

impl debian::Progress for Shown<'_> {
    fn started(&mut self, phase: Phase, total: u64) {
        let name = match phase {
            Phase::Waiting => "waiting for another yado that builds an image",
            Phase::Indexing => "looking for packages",
            Phase::Downloading => "downloading packages",
            Phase::Unpacking => "unpacking packages",
            Phase::Finishing => "finishing the disk",
        };
        self.0.begin(name, (total > 0).then_some(total));
    }

    fn advanced(&mut self, bytes: u64) {
        self.0.advance(bytes);
    }

    fn finished(&mut self) {
        self.0.finish();
    }
}

/// Refuses memory that the host cannot give, before anything is built.
pub fn check_memory(wanted: Size) -> anyhow::Result<()> {
    const LEAST: u64 = 2 << 20;
    anyhow::ensure!(
        wanted.0 >= LEAST,
        with_code(
            2,
            format!("--memory {wanted}: a guest needs at least {}; the default is 512M", Size(LEAST))
        )
    );
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib << 10);
    match total {
        Some(total) if wanted.0 > total => Err(with_code(
            2,
            format!("--memory {wanted}: this host has only {} of RAM; choose less", Size(total)),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn linux_is_heard_unless_the_user_says_otherwise() {
        let directory = tempfile::tempdir().unwrap();
        let linux = directory.path().join("vmlinuz");
        let mut image = vec![0; 0x300];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        std::fs::write(&linux, image).unwrap();
        let other = directory.path().join("other");
        std::fs::write(&other, b"\x7fELF").unwrap();
        let line = |given| direct_command_line(&linux, given);
        assert_eq!(line(""), "console=ttyS0 panic=-1");
        assert_eq!(line("root=/dev/vda quiet"), "console=ttyS0 panic=-1 root=/dev/vda quiet");
        assert_eq!(line("console=hvc0"), "panic=-1 console=hvc0");
        assert_eq!(line("panic=0 console=ttyS0,115200"), "panic=0 console=ttyS0,115200");
        assert_eq!(line("quiet -- panic=1"), "console=ttyS0 panic=-1 quiet -- panic=1");
        assert_eq!(direct_command_line(&other, "a b"), "a b");
        assert_eq!(direct_command_line("nowhere".as_ref(), ""), "");
    }
}
