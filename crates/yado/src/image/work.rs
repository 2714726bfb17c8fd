//! The commands that take long: with progress, and an end in order when the user wants one.

use super::arguments::{CloneImage, Commit, Convert, Rebase};
use super::options::{self, New, usage};
use super::{make, open, reading, replace};
use crate::exit::with_code;
use crate::progress::Phases;
use crate::signals;
use anyhow::{Context, Result};
use image::format::Format;
use image::format::qcow2::CreateOptions;
use image::job::{self, ConvertOptions, Progress, Target};
use image::nbd::Uri;
use image::storage::CacheMode;
use image::{Disk, Image, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often progress is looked at.
const PERIOD: Duration = Duration::from_millis(50);

/// Runs of zeroes of so many bytes are not stored where nobody says otherwise.
const SPARSE: u64 = 4096;

/// What is shown of a job.
pub struct Show<'a> {
    pub name: &'a str,
    /// Bytes.
    pub total: u64,
    pub quiet: bool,
}

/// Runs a job and calls `look` with how far it is, now and then and at its end; ends it when the user wants that.
pub fn watched<T: Send>(
    job: impl FnOnce(&Progress) -> io::Result<T> + Send,
    mut look: impl FnMut(u64),
) -> io::Result<T> {
    let _watching = signals::watching();
    let (progress, over) = (Progress::default(), AtomicBool::new(false));
    let watcher = std::thread::current();
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let result = job(&progress);
            over.store(true, Ordering::Release);
            watcher.unpark();
            result
        });
        let mut wait = Duration::from_millis(1);
        // A job that panics wakes nobody.
        while !over.load(Ordering::Acquire) && !worker.is_finished() {
            std::thread::park_timeout(std::mem::replace(&mut wait, PERIOD));
            if signals::cancelled() {
                progress.cancel();
            }
            look(progress.done());
        }
        let result = worker.join().unwrap_or_else(|_| Err(io::Error::other("the job has failed")));
        look(progress.done());
        result
    })
}

/// Runs a job, shows how far it is, and ends it when the user wants that.
pub fn with_progress<T: Send>(
    show: Show<'_>,
    job: impl FnOnce(&Progress) -> io::Result<T> + Send,
) -> Result<T> {
    let mut phases = Phases::new(show.quiet);
    phases.begin(show.name, Some(show.total));
    let mut seen = 0;
    let result = watched(job, |done| {
        phases.advance(done.saturating_sub(seen));
        seen = done;
    });
    match result {
        Err(_) if signals::cancelled() => Err(with_code(signals::cancelled_code(), "cancelled")),
        other => {
            phases.finish();
            other.with_context(|| format!("{} failed", show.name))
        }
    }
}

pub fn convert(arguments: &Convert) -> Result<()> {
    let source = open(&arguments.source, arguments.format.as_deref(), reading(arguments.force_share))?;
    let disk: Arc<dyn Disk> = match &arguments.snapshot {
        None => source.disk.clone(),
        Some(name) => Arc::new(source.as_qcow2("internal snapshots")?.at_snapshot(name)?),
    };
    let format = options::format(&arguments.target_format)?;
    if arguments.compress && format != Format::Qcow2 {
        return Err(usage(format!("{format} images cannot be compressed: use -O qcow2")));
    }
    let mut new = New::parse(format, &arguments.options)?;
    new.size = disk.capacity().checked_next_multiple_of(512).unwrap_or(0);
    // What the image below has is not copied, and what it has more must be covered.
    let over = if arguments.no_create { None } else { below(&arguments.target, &new)? };
    // A raw copy of a raw image shares its blocks where the file system can.
    let plain = (source.format, format) == (Format::Raw, Format::Raw) && arguments.options.is_empty();
    let copying = Copying {
        disk,
        new,
        over: over.as_ref().map(|image| image.disk.clone()),
        compress: arguments.compress,
        threads: arguments.threads,
        sparse: arguments.sparse.map_or(SPARSE, |size| size.0),
        cache: CacheMode::default(),
        whole: plain.then_some(&arguments.source),
        // Whoever says which zeroes are not stored wants them looked for.
        share: arguments.sparse.is_none(),
    };
    let watch = |total: u64, job: &(dyn Fn(&Progress) -> io::Result<()> + Sync)| {
        with_progress(Show { name: "converting", total, quiet: arguments.quiet }, job)
    };
    if arguments.no_create {
        return copying.fill(&arguments.target, arguments.target_is_zero, &watch);
    }
    if arguments.target.to_str().is_some_and(Uri::looks_like) {
        return Err(usage("an NBD export is there already: say -n to write into it"));
    }
    if same_file(&arguments.source, &arguments.target) {
        return Err(usage("source and target are the same file"));
    }
    copying.make_target(&arguments.target, &watch)
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// The image that a new one is to build on, where the options name one.
pub fn below(target: &Path, new: &New) -> Result<Option<Image>> {
    let Some((name, format)) = &new.backing else { return Ok(None) };
    // Names in the new image are meant from where it is, not from where a link to it is.
    let target = target.canonicalize().unwrap_or_else(|_| target.to_path_buf());
    let how = OpenOptions { format: Some(options::format(format)?), ..reading(false) };
    Ok(Some(Image::open(&image::beside(&target, name)?, how)?))
}

/// Runs a job on so many bytes, and shows how far it is.
pub type Watch<'a> = &'a dyn Fn(u64, &(dyn Fn(&Progress) -> io::Result<()> + Sync)) -> Result<()>;

/// A copy of a disk, and how it is made.
pub struct Copying<'a> {
    pub disk: Arc<dyn Disk>,
    pub new: New,
    /// The disk below the target: what is the same there is not copied.
    pub over: Option<Arc<dyn Disk>>,
    pub compress: bool,
    pub threads: Option<usize>,
    /// Runs of zeroes this long are not stored.
    pub sparse: u64,
    /// Of the target.
    pub cache: CacheMode,
    /// A file that is the disk, byte for byte: the copy may share all its blocks.
    pub whole: Option<&'a PathBuf>,
    /// The copy may share what blocks it can.
    pub share: bool,
}

impl Copying<'_> {
    /// Makes the target.
    pub fn make_target(&self, target: &Path, watch: Watch<'_>) -> Result<()> {
        // A link stays one: what it leads to is replaced.
        let target = target.canonicalize().unwrap_or_else(|_| target.to_path_buf());
        let data = self.new_data_file(&target)?;
        let _unfinished = data.as_deref().map(signals::unfinished);
        self.make_at(&target, watch).inspect_err(|_| {
            if let Some(data) = data {
                let _ = std::fs::remove_file(data);
            }
        })
    }

    /// The file for the data of the new image, if it is to have one. What is there may be the data of the very image that
    /// is to stay until the copy is whole.
    fn new_data_file(&self, target: &Path) -> Result<Option<PathBuf>> {
        let Some((name, _)) = self.new.qcow2().data_file else { return Ok(None) };
        let place = image::beside(target, &name)?;
        if place.symlink_metadata().is_ok() {
            return Err(usage(format!(
                "data_file={name}: {} is there already, and would be emptied before the copy is whole: name a new file, or \
                 remove it first",
                place.display()
            )));
        }
        Ok(Some(place))
    }

    fn make_at(&self, target: &Path, watch: Watch<'_>) -> Result<()> {
        if target.metadata().is_ok_and(|metadata| !metadata.is_file()) {
            // A device is no file that another one could take the place of.
            make(target, &self.new)?;
            return self.fill(target, false, watch);
        }
        // What is there stays until the copy is whole, and nobody begins to use it.
        let _held = replace::hold(target)?;
        let old = target.metadata().ok();
        old.as_ref().map_or(Ok(()), |old| replace::check_names(target, old))?;
        let partial = replace::beside(target);
        let _unfinished = signals::unfinished(&partial);
        let made = self.make_and_fill(&partial, old.is_some(), watch);
        let moved = made.and_then(|()| match &old {
            Some(old) => replace::replace(&partial, target, old),
            None => replace::rename(&partial, target),
        });
        moved.inspect_err(|_| {
            let _ = std::fs::remove_file(&partial);
        })
    }

    /// A copy that is to be `private` is its owner's alone until it has another's mode.
    fn make_and_fill(&self, partial: &Path, private: bool, watch: Watch<'_>) -> Result<()> {
        if self.whole.is_some_and(|from| image::share_blocks(from, partial).is_ok()) {
            return Ok(());
        }
        if private {
            replace::make_private(partial)?;
        }
        make(partial, &self.new)?;
        self.fill(partial, true, watch)
    }

    /// Writes the disk into an image that is there.
    pub fn fill(&self, file: &Path, target_is_zero: bool, watch: Watch<'_>) -> Result<()> {
        let how = OpenOptions { format: Some(self.new.format), cache: self.cache, ..OpenOptions::default() };
        let target = Image::open(file, how)?;
        let threads = self.threads.unwrap_or_else(job::usual_threads).clamp(1, 64);
        let options = ConvertOptions { threads, sparse: self.sparse, target_is_zero, share: self.share };
        watch(self.disk.capacity(), &|progress: &Progress| {
            let to = match &target.qcow2 {
                Some(qcow2) if self.compress => Target::Compressed(qcow2),
                _ => Target::Plain(target.disk.as_ref()),
            };
            match &self.over {
                Some(below) => job::convert_over(self.disk.as_ref(), to, below.as_ref(), options, progress),
                None => job::convert(self.disk.as_ref(), to, options, progress),
            }
        })?;
        Ok(target.close()?)
    }
}

/// Refuses an image with internal snapshots where what is below it is to change: what they have not they show from there.
pub fn check_snapshots(top: &Image) -> Result<()> {
    match top.qcow2.as_ref().map_or(0, |qcow2| qcow2.header().snapshots) {
        0 => Ok(()),
        count => Err(usage(format!(
            "{}: its {count} internal snapshots show what is below it, which would change: delete them, or convert them to \
             images of their own (-l)",
            top.path.display()
        ))),
    }
}

pub fn rebase(arguments: &Rebase) -> Result<()> {
    let how = OpenOptions { alone: arguments.blind, ..OpenOptions::default() };
    // Without a format an image's own names are not believed; changing the name alone needs none of them.
    let top = open(&arguments.file, arguments.format.as_deref(), how)?;
    let container = top.as_container("backing files")?;
    if !top.format.can_change_base() {
        return Err(usage(format!(
            "{} images keep the base they were made with: convert to qcow2",
            top.format
        )));
    }
    let named = match (arguments.backing.as_str(), &arguments.backing_format) {
        ("", _) => None,
        (name, Some(format)) => Some((name.to_owned(), options::format(format)?)),
        (name, None) => {
            return Err(usage(format!("say the format of {name} with -F: it is written into the image")));
        }
    };
    if !arguments.blind {
        check_snapshots(&top)?;
        let new = match &named {
            Some((name, format)) => {
                let place = image::beside(&arguments.file, name)?;
                let how = OpenOptions { format: Some(*format), ..reading(false) };
                Some(Image::open(&place, how)?)
            }
            None => None,
        };
        let show = Show { name: "rebasing", total: top.disk.capacity(), quiet: arguments.quiet };
        with_progress(show, |progress| {
            let new = new.as_ref().map(|image| image.disk.as_ref());
            let cluster = container.facts().cluster_size.unwrap_or(1 << 16);
            job::rebase(top.disk.as_ref(), cluster, new, job::usual_threads(), progress)
        })?;
    }
    let names = named.as_ref().map(|(name, format)| (name.as_str(), *format));
    container.set_backing(names).with_context(|| format!("cannot change {}", arguments.file.display()))?;
    Ok(top.close()?)
}

pub fn commit(arguments: &Commit) -> Result<()> {
    let format = Some(arguments.format.as_deref().unwrap_or("qcow2"));
    let (base, base_format) = {
        let top = open(&arguments.file, format, reading(false))?;
        let below = top.backing.as_deref();
        let below =
            below.ok_or_else(|| usage(format!("{} has no backing file", arguments.file.display())))?;
        (below.path.clone(), below.format)
    };
    // Below the top one everything is written: it must not be open for reading meanwhile.
    let alone = OpenOptions { alone: true, ..OpenOptions::default() };
    let top = open(&arguments.file, format, alone)?;
    let container = top.as_container("backing files")?;
    check_snapshots(&top)?;
    let below = Image::open(&base, OpenOptions { format: Some(base_format), ..OpenOptions::default() })?;
    let capacity = top.disk.capacity();
    if below.disk.capacity() < capacity {
        below.disk.resize(capacity).with_context(|| format!("cannot make {} larger", base.display()))?;
    }
    let show = Show { name: "committing", total: capacity, quiet: arguments.quiet };
    with_progress(show, |progress| {
        job::commit(top.disk.as_ref(), below.disk.as_ref(), job::usual_threads(), progress)
    })?;
    below.close()?;
    if !arguments.keep {
        container.empty().with_context(|| format!("cannot empty {}", arguments.file.display()))?;
    }
    if !arguments.quiet {
        println!("Image committed.");
    }
    Ok(top.close()?)
}

pub fn clone(arguments: &CloneImage) -> Result<()> {
    let (file, clone) = (&arguments.file, &arguments.clone);
    if clone.exists() {
        return Err(usage(format!("{} is there already", clone.display())));
    }
    let source = open(file, Some(&arguments.format), reading(false))?;
    let say = |text: String| {
        if !arguments.quiet {
            println!("{text}");
        }
    };
    let facts = source.container.as_ref().map(|container| container.facts()).unwrap_or_default();
    // What an image builds on is named from where it is; and data in another file would be the data of both.
    let same_place = facts.backing.is_none() || file.parent() == clone.parent();
    let whole = facts.details.iter().all(|(name, _)| *name != "data-file");
    if whole && same_place && image::share_blocks(file, clone).is_ok() {
        say(format!("{} shares its blocks with {} ({}).", clone.display(), file.display(), source.format));
        return Ok(());
    }
    let place = std::path::absolute(file).with_context(|| format!("cannot find {}", file.display()))?;
    let name = place.to_str().with_context(|| format!("the name of {} is no text", file.display()))?;
    let options = CreateOptions {
        backing: Some((name.to_owned(), source.format.to_string())),
        ..CreateOptions::new(source.disk.capacity())
    };
    image::create_qcow2(clone, &options)?.close()?;
    say(format!("{} (qcow2) builds on {}, which must not change any more.", clone.display(), file.display()));
    Ok(())
}
