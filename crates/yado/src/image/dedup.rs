//! `yado image dedup`: equal parts of several images become one.
//!
//! Without `--base` the file system shares blocks of the files. With it qcow2 images are put on a base image: for each a new
//! image is made beside the old one and compared with it, and then takes its name in one step. A crash at any moment leaves every image
//! as it was or on top of the base, and at worst files called `.NAME.NUMBER.partial`, which are nobody's.

use super::options::usage;
use super::replace::{beside, check_names, directory, make_private, replace};
use super::work::{Show, with_progress};
use super::{arguments::Shown, open, print_json};
use crate::signals::unfinished;
use crate::size::Size;
use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::ValueHint;
use image::format::qcow2::{CreateOptions, Qcow2};
use image::job::dedup::{check_block, extents, store};
use image::job::{self, ConvertOptions, Difference, Target};
use image::storage::{Storage, StorageFile};
use image::{Disk, Image, OpenOptions};
use serde_json::{Value, json};
use std::fs::{File, Metadata};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub struct Dedup {
    /// Move what the images (qcow2 alone) have in common into this new image, and put them on top of it; if it is there,
    /// put them on top of it as it is
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub base: Option<PathBuf>,
    /// Bytes that are compared as one: a power of two from 4K to 2M
    #[arg(long, value_name = "SIZE", default_value = "64K")]
    pub block_size: Size,
    /// Only say what would be saved
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Threads
    #[arg(short = 'm', long, value_name = "N")]
    pub threads: Option<usize>,
    /// Do it though the images are in use: the file system makes sure that nothing changes
    #[arg(short = 'U', long, conflicts_with = "base")]
    pub force_share: bool,
    #[command(flatten)]
    pub shown: Shown,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The images
    #[arg(required = true, value_hint = ValueHint::FilePath)]
    pub files: Vec<PathBuf>,
}

impl Dedup {
    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(job::usual_threads).clamp(1, 64)
    }

    fn block(&self) -> u64 {
        self.block_size.0
    }

    fn show(&self, name: &'static str, total: u64) -> Show<'static> {
        Show { name, total, quiet: self.quiet || self.shown.as_json() }
    }
}

pub fn dedup(arguments: &Dedup) -> Result<()> {
    check_block(arguments.block()).map_err(|error| usage(format!("--block-size: {error}")))?;
    let mut seen = std::collections::HashSet::new();
    for file in &arguments.files {
        let place = file.canonicalize().with_context(|| format!("cannot find {}", file.display()))?;
        if !seen.insert(place) {
            return Err(usage(format!("{} is named twice", file.display())));
        }
    }
    match &arguments.base {
        None => share(arguments),
        Some(base) => rest_on(arguments, base),
    }
}

/// Has the file system share blocks.
fn share(arguments: &Dedup) -> Result<()> {
    for file in &arguments.files {
        let place = directory(file);
        if !extents::is_possible(place).with_context(|| format!("cannot try {}", place.display()))? {
            bail!(
                "the file system of {} shares no blocks (btrfs does, and XFS): move what qcow2 images have in common into a base \
                 image, with --base FILE",
                file.display()
            );
        }
    }
    let open = |file: &PathBuf| match arguments.force_share {
        true => StorageFile::open_shared(file, false),
        false => StorageFile::open(file, false),
    };
    let files = arguments.files.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let total = files.iter().map(Storage::len).fold(0, u64::saturating_add);
    let plan = with_progress(arguments.show("reading", total), |progress| {
        extents::plan(&files, arguments.block(), arguments.threads(), progress)
    })?;
    let mut sums = plan.sums();
    if !arguments.dry_run {
        with_progress(arguments.show("sharing", plan.proposed()), |progress| {
            extents::share(&files, &plan, progress)
        })
        .context("the file system does not share all of it")?;
        // What files changed meanwhile was left alone.
        let left = with_progress(arguments.show("looking again", total), |progress| {
            extents::plan(&files, arguments.block(), arguments.threads(), progress)
        })?;
        sums.saved = sums.saved.saturating_sub(left.sums().saved);
    }
    if arguments.shown.as_json() {
        return print_json(&json!({
            "mode": "extents",
            "dry-run": arguments.dry_run,
            "block-size": arguments.block(),
            "data": sums.scanned,
            "equal": sums.equal,
            "shared-before": sums.shared,
            "saved": sums.saved,
        }));
    }
    if !arguments.quiet {
        let would = if arguments.dry_run { "can be saved" } else { "saved" };
        println!(
            "{} of data, {} of it equal to other data, {} shared already; {} {would}.",
            Size(sums.scanned),
            Size(sums.equal),
            Size(sums.shared),
            Size(sums.saved)
        );
    }
    Ok(())
}

/// An image that is to be put on a base.
struct Candidate<'a> {
    file: &'a Path,
    image: Image,
    gain: store::Gain,
    /// Bytes that its file takes, before and after.
    before: u64,
    after: Option<u64>,
}

impl Candidate<'_> {
    fn qcow2(&self) -> Result<&Qcow2> {
        Ok(self.image.as_qcow2("backing files")?)
    }
}

/// Puts images on a base.
fn rest_on(arguments: &Dedup, base: &Path) -> Result<()> {
    let there = base.exists();
    let mut candidates = Vec::new();
    for file in &arguments.files {
        if let Some(image) = open_alone(file, base, arguments.dry_run)? {
            let before = image.storage.allocated().unwrap_or(0);
            candidates.push(Candidate { file, image, gain: store::Gain::default(), before, after: None });
        }
    }
    let base_bytes = match there {
        true => weigh(arguments, base, &mut candidates)?,
        false => make_base(arguments, base, &mut candidates)?,
    };
    if !arguments.dry_run && base.exists() {
        for candidate in candidates.iter_mut().filter(|candidate| candidate.gain.in_base > 0) {
            put_on(arguments, base, candidate)?;
        }
    }
    // A base that was there costs nothing more.
    tell(arguments, base, (base_bytes, !there), &candidates)
}

/// Opens an image that nobody uses, and that can be put on a base; `None` if it is on this one.
fn open_alone(file: &Path, base: &Path, dry_run: bool) -> Result<Option<Image>> {
    // To look at it must not repair it.
    let how = OpenOptions { alone: true, read_only: dry_run, ..OpenOptions::default() };
    let image = open(file, Some("qcow2"), how)?;
    check_names(file, &std::fs::metadata(file)?)?;
    let qcow2 = image.as_qcow2("backing files")?;
    let header = qcow2.header();
    let refuse = |what: &str| Err(usage(format!("{}: {what}", file.display())));
    if let Some(name) = &header.backing {
        let below = image::beside(file, name)?.canonicalize();
        if below.is_ok_and(|below| base.canonicalize().is_ok_and(|base| base == below)) {
            return Ok(None);
        }
        return refuse("it has a backing file already: give it none first (yado image rebase -b \"\")");
    }
    if header.snapshots > 0 {
        return refuse(
            "its internal snapshots would be lost: delete them first, or convert them to images of their own",
        );
    }
    if header.bitmaps.is_some() {
        return refuse("its dirty bitmaps would be lost: remove them first (yado image bitmap --remove)");
    }
    if header.data_file.is_some() {
        return refuse("its data is in another file: convert it first");
    }
    Ok(Some(image))
}

/// What images gain from a base that is there. Answers the bytes that its file takes.
fn weigh(arguments: &Dedup, base: &Path, candidates: &mut [Candidate<'_>]) -> Result<u64> {
    let below = open(base, Some("qcow2"), super::reading(false))?;
    for candidate in candidates {
        let disk = candidate.image.disk.as_ref();
        candidate.gain =
            with_progress(arguments.show("comparing with the base", disk.capacity()), |progress| {
                store::gain(disk, below.disk.as_ref(), arguments.block(), progress)
            })?;
    }
    Ok(below.storage.allocated().unwrap_or(0))
}

/// Finds what images have in common and writes it into a new base. Answers the bytes that it takes, or would.
fn make_base(arguments: &Dedup, base: &Path, candidates: &mut [Candidate<'_>]) -> Result<u64> {
    let plan = {
        let disks: Vec<&dyn Disk> =
            candidates.iter().map(|candidate| candidate.image.disk.as_ref()).collect();
        let total = disks.iter().map(|disk| disk.capacity()).fold(0, u64::saturating_add);
        with_progress(arguments.show("reading", total), |progress| {
            store::plan(&disks, arguments.block(), arguments.threads(), progress)
        })?
    };
    for (candidate, gain) in candidates.iter_mut().zip(plan.gains()) {
        candidate.gain = *gain;
    }
    if arguments.dry_run || plan.base_data() == 0 {
        return Ok(plan.base_data());
    }
    let disks: Vec<&dyn Disk> = candidates.iter().map(|candidate| candidate.image.disk.as_ref()).collect();
    let partial = beside(base);
    let _unfinished = unfinished(&partial);
    let made = || -> Result<u64> {
        let options = CreateOptions {
            cluster_bits: arguments.block().trailing_zeros(),
            ..CreateOptions::new(plan.capacity())
        };
        make_private(&partial)?;
        let new = image::create_qcow2(&partial, &options)?;
        let qcow2 = new.as_qcow2("clusters")?;
        with_progress(arguments.show("writing the base", plan.shown()), |progress| {
            store::write(&plan, &disks, qcow2, progress)
        })?;
        new.close()?;
        drop(new);
        let file = File::open(&partial)?;
        as_shared(&file, candidates)?;
        file.sync_all()?;
        // Nothing that came there meanwhile is overwritten.
        std::fs::hard_link(&partial, base).with_context(|| format!("cannot make {}", base.display()))?;
        std::fs::remove_file(&partial)?;
        File::open(directory(base))?.sync_all()?;
        Ok(file.metadata()?.blocks().saturating_mul(512))
    };
    made().inspect_err(|_| {
        let _ = std::fs::remove_file(&partial);
    })
}

/// Lets those read a base who may read all images on top of it, and nobody write it: that would change all of them.
fn as_shared(base: &File, candidates: &[Candidate<'_>]) -> Result<()> {
    let images = candidates.iter().map(|candidate| std::fs::metadata(candidate.file));
    let images = images.collect::<std::io::Result<Vec<_>>>()?;
    let own = base.metadata()?;
    // Where all of them have one owner or group the base is theirs, too; only root can give it away.
    let all = |of: fn(&Metadata) -> u32| {
        let first = images.first().map(of);
        first.filter(|first| images.iter().all(|image| of(image) == *first))
    };
    let other = |now: u32, wanted: Option<u32>| wanted.filter(|wanted| *wanted != now);
    let (owner, group) = (other(own.uid(), all(Metadata::uid)), other(own.gid(), all(Metadata::gid)));
    if owner.is_some() || group.is_some() {
        std::os::unix::fs::fchown(base, owner, group).context("cannot give the base to the images' owner")?;
    }
    let mode = images.iter().fold(0o444, |mode, image| mode & image.mode());
    Ok(base.set_permissions(PermissionsExt::from_mode(mode))?)
}

/// The name by which an image calls its base: beside it as it is, else from the root.
fn name_for(file: &Path, base: &Path) -> Result<String> {
    let (here, there) = (directory(file).canonicalize()?, directory(base).canonicalize()?);
    let name = base.file_name().context("the base has no name")?;
    let place = if here == there { PathBuf::from(name) } else { there.join(name) };
    let text = place.to_str().with_context(|| format!("the name of {} is no text", base.display()))?;
    Ok(if text.contains(':') && here == there { format!("./{text}") } else { text.to_owned() })
}

/// Makes an image on top of the base that reads the same, and lets it take the old one's name.
fn put_on(arguments: &Dedup, base: &Path, candidate: &mut Candidate<'_>) -> Result<()> {
    // A link stays one: what it leads to is replaced.
    let file = candidate.file.canonicalize()?;
    let partial = beside(&file);
    let _unfinished = unfinished(&partial);
    let replaced = move_to(arguments, base, candidate, &file, &partial);
    match replaced {
        Ok(after) => {
            candidate.after = after;
            if after.is_none() {
                let _ = std::fs::remove_file(&partial);
            }
            Ok(())
        }
        Err(error) => {
            let _ = std::fs::remove_file(&partial);
            Err(error).with_context(|| format!("{} stays as it was", file.display()))
        }
    }
}

/// Answers the bytes that the new file takes; `None` if it would be no smaller.
fn move_to(
    arguments: &Dedup,
    base: &Path,
    candidate: &Candidate<'_>,
    file: &Path,
    partial: &Path,
) -> Result<Option<u64>> {
    let header = candidate.qcow2()?.header();
    let old = candidate.image.disk.as_ref();
    let options = CreateOptions {
        version: header.version,
        cluster_bits: header.cluster_bits,
        refcount_order: header.refcount_order,
        lazy_refcounts: header.compatible & 1 != 0,
        extended_l2: header.extended_l2(),
        compression: header.compression,
        backing: Some((name_for(file, base)?, "qcow2".to_owned())),
        ..CreateOptions::new(old.capacity())
    };
    {
        make_private(partial)?;
        let new = image::create_qcow2(partial, &options)?;
        let below = new.backing.as_ref().context("the new image has no base")?;
        let how = ConvertOptions {
            threads: arguments.threads(),
            sparse: 4096,
            target_is_zero: false,
            share: false,
        };
        with_progress(arguments.show("moving to the base", old.capacity()), |progress| {
            let to = Target::Plain(new.disk.as_ref());
            job::convert_over(old, to, below.disk.as_ref(), how, progress)
        })?;
        new.close()?;
    }
    let metadata = std::fs::metadata(file)?;
    {
        // As anybody will open it.
        let new = open(partial, Some("qcow2"), super::reading(false))?;
        let found = with_progress(arguments.show("comparing", old.capacity()), |progress| {
            job::compare(old, new.disk.as_ref(), arguments.threads(), progress)
        })?;
        if found != Difference::None || new.disk.capacity() != old.capacity() {
            bail!("the new image does not read as the old one ({found:?}): its base may have been changed");
        }
        let after = new.storage.allocated().unwrap_or(u64::MAX);
        if after >= candidate.before {
            return Ok(None);
        }
    }
    replace(partial, file, &metadata)?;
    Ok(Some(std::fs::metadata(file)?.blocks().saturating_mul(512)))
}

fn tell(
    arguments: &Dedup,
    base: &Path,
    (base_bytes, is_new): (u64, bool),
    candidates: &[Candidate<'_>],
) -> Result<()> {
    let sum = |of: fn(&Candidate<'_>) -> u64| candidates.iter().map(of).fold(0, u64::saturating_add);
    let (data, in_base) = (sum(|one| one.gain.data), sum(|one| one.gain.in_base));
    // Data that is to be moved, or what files take before and after.
    let gained = if arguments.dry_run {
        in_base
    } else {
        sum(|one| one.after.map_or(0, |after| one.before.saturating_sub(after)))
    };
    let saved = i128::from(gained) - i128::from(if is_new { base_bytes } else { 0 });
    let saved = i64::try_from(saved).unwrap_or(i64::MAX);
    if arguments.shown.as_json() {
        let row = |one: &Candidate<'_>| -> Value {
            json!({
                "filename": one.file,
                "data": one.gain.data,
                "in-base": one.gain.in_base,
                "size-before": one.before,
                "size-after": one.after,
            })
        };
        return print_json(&json!({
            "mode": "base",
            "dry-run": arguments.dry_run,
            "block-size": arguments.block(),
            "base": base,
            "base-size": base_bytes,
            "data": data,
            "equal": in_base,
            "saved": saved,
            "images": candidates.iter().map(row).collect::<Vec<_>>(),
        }));
    }
    if !arguments.quiet {
        let would = if arguments.dry_run { "can be saved" } else { "saved" };
        let amount = format!("{}{}", if saved < 0 { "-" } else { "" }, Size(saved.unsigned_abs()));
        println!(
            "{} of data, {} of it in the base {}, which takes {}; {amount} {would}.",
            Size(data),
            Size(in_base),
            base.display(),
            Size(base_bytes)
        );
        let kept = candidates.iter().filter(|one| !arguments.dry_run && one.after.is_none());
        kept.for_each(|one| println!("{} stays as it is: it would not be smaller.", one.file.display()));
    }
    Ok(())
}
