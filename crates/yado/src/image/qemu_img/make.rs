//! What makes images, or changes them in place: create, resize, snapshot, bitmap, bench.

use super::super::options::{New, split};
use super::arguments::{Bench, Bitmap, Create, Resize, Snapshot};
use super::{fail, forms, open, plain, show, size};
use crate::image::make;
use anyhow::{Context, Result};
use image::format::qcow2::Change;
use image::format::{Format, vhd};
use image::job::{self, Load};
use image::{Image, OpenOptions};
use std::path::Path;

pub fn create(arguments: &Create) -> Result<()> {
    let unknown =
        |file: &Path| fail(format!("{}: Unknown file format '{}'", file.display(), arguments.format));
    if arguments.options.iter().any(|list| list == "help") {
        let format: Format = arguments.format.parse().map_err(|_| unknown(Path::new("")))?;
        println!("{}", super::options::help(format));
        return Ok(());
    }
    let Some(file) = &arguments.file else {
        return Err(fail("Expecting image file name\nTry 'qemu-img --help' for more information"));
    };
    let wrong = |text: String| fail(format!("{}: {text}", file.display()));
    let format: Format = arguments.format.parse().map_err(|_| unknown(file))?;
    let mut lists = arguments.options.clone();
    let comma = |text: &str| text.replace(',', ",,");
    if let Some(name) = &arguments.backing {
        lists.push(format!("backing_file={}", comma(name)));
    }
    if let Some(name) = &arguments.backing_format {
        lists.push(format!("backing_fmt={}", comma(name)));
    }
    let said = arguments.size.as_ref().map(|text| size(text, "Invalid image size specified.")).transpose()?;
    let mut new = New::parse(format, &lists).map_err(|error| wrong(error.to_string()))?;
    let mut bytes = said.or(Some(new.size).filter(|size| *size > 0));
    if let Some((name, below)) = &new.backing {
        let place = image::beside(file, name)?;
        if below.is_empty() {
            let how = OpenOptions { read_only: true, alone: true, ..OpenOptions::default() };
            let found = Image::open(&place, how)
                .map_or(String::new(), |image| format!("\nDetected format of {}.", image.format));
            return Err(wrong(format!("Backing file specified without backing format{found}")));
        }
        if !arguments.blind {
            let format =
                below.parse().map_err(|_| wrong(format!("Unknown backing file format '{below}'")))?;
            let how = OpenOptions { format: Some(format), read_only: true, ..OpenOptions::default() };
            let below = Image::open(&place, how)
                .map_err(|error| wrong(format!("{}\nCould not open backing image.", once(&error, &place))))?;
            bytes = bytes.or(Some(below.disk.capacity()));
        }
    }
    let bytes = bytes.ok_or_else(|| wrong("Image creation needs a size parameter".into()))?;
    if !arguments.quiet {
        println!("{}", forms::formatting(&file.to_string_lossy(), format, &lists, bytes));
    }
    new.size =
        bytes.checked_next_multiple_of(512).ok_or_else(|| wrong("The image size is too large".into()))?;
    if format == Format::Vhd && !is_on(&lists, "force_size") {
        new.size = vhd::with_whole_cylinders(new.size);
    }
    let done = if arguments.blind && format == Format::Qcow2 {
        image::create_qcow2_alone(file, &new.qcow2()).and_then(|image| image.close()).map_err(Into::into)
    } else {
        make(file, &new)
    };
    done.map_err(|error| wrong(plain(&crate::sentence(&error))))
}

/// Whether an option that is on or off is on.
fn is_on(lists: &[String], name: &str) -> bool {
    let said: Vec<String> = lists.iter().flat_map(|list| split(list)).collect();
    let value = |option: &String| Some(option.strip_prefix(name)?.strip_prefix('=')?.to_owned());
    let last = said.iter().rev().find_map(value);
    last.is_some_and(|value| ["on", "yes", "true"].contains(&value.as_str()))
}

/// Why a backing file cannot be opened, its name said once.
fn once(error: &image::Error, place: &Path) -> String {
    match error {
        image::Error::Open { source, .. } => {
            format!("Could not open '{}': {}", place.display(), plain(&source.to_string()))
        }
        other => other.to_string(),
    }
}

/// A new size, which may be relative to that of the disk.
fn new_size(text: &str, now: u64) -> Result<u64> {
    let expects = "Parameter 'size' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means \
                   kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.";
    let parse = |text: &str| text.parse::<crate::size::Size>().map(|size| size.0).map_err(|_| fail(expects));
    let size = match text.split_at_checked(1) {
        Some(("+", more)) => now.checked_add(parse(more)?),
        Some(("-", less)) => now.checked_sub(parse(less)?),
        _ => Some(parse(text)?),
    };
    let size = size.filter(|size| *size > 0).ok_or_else(|| fail("New image size must be positive"))?;
    size.checked_next_multiple_of(512).ok_or_else(|| fail("The image size is too large"))
}

pub fn resize(arguments: &Resize) -> Result<()> {
    let image = open(&arguments.source, &arguments.file, OpenOptions::default())?;
    if arguments.preallocation != "off" {
        return Err(fail(format!(
            "preallocation={} is not done while an image is resized: write zeroes to what is new",
            arguments.preallocation
        )));
    }
    let now = image.disk.capacity();
    let bytes = new_size(&arguments.size, now)?;
    if bytes < now && !arguments.shrink {
        return Err(fail(
            "Use the --shrink option to perform a shrink operation.\nqemu-img: warning: Shrinking an image will delete all \
             data beyond the shrunken image's end. Before performing such an operation, make sure there is no important data \
             there.",
        ));
    }
    image.disk.resize(bytes).with_context(|| format!("cannot resize {}", arguments.file.display()))?;
    image.close()?;
    if !arguments.quiet {
        println!("Image resized.");
    }
    Ok(())
}

pub fn snapshot(arguments: &Snapshot) -> Result<()> {
    let actions =
        [arguments.create.is_some(), arguments.apply.is_some(), arguments.delete.is_some(), arguments.list];
    if actions.into_iter().filter(|is| *is).count() > 1 {
        return Err(fail("Cannot mix '-l', '-a', '-c', '-d'\nTry 'qemu-img --help' for more information"));
    }
    let changes = !arguments.list && actions.contains(&true);
    // Internal snapshots are about this image alone.
    let how = OpenOptions { read_only: !changes, alone: true, ..OpenOptions::default() };
    let image = open(&arguments.source, &arguments.file, how)?;
    let not_there = || std::io::Error::from(std::io::ErrorKind::Unsupported);
    let qcow2 = image.qcow2.as_ref();
    let missing = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
    if let Some(name) = &arguments.create {
        let done = qcow2.map_or(Err(not_there()), |qcow2| qcow2.create_snapshot(name, 0, 0).map(drop));
        done.map_err(|error| {
            let why = match error.kind() {
                std::io::ErrorKind::Unsupported if qcow2.is_none() => {
                    "-95 (Operation not supported)".to_owned()
                }
                _ => error.to_string(),
            };
            fail(format!("Could not create snapshot '{name}': {why}"))
        })?;
    } else if let Some(name) = &arguments.apply {
        let done = qcow2.map_or(Err(not_there()), |qcow2| qcow2.apply_snapshot(name));
        done.map_err(|error| {
            let why = match missing(&error) {
                true => "Failed to load snapshot: No such file or directory".to_owned(),
                false => error.to_string(),
            };
            fail(format!("Could not apply snapshot '{name}': {why}"))
        })?;
    } else if let Some(name) = &arguments.delete {
        let done = qcow2.map_or(Err(not_there()), |qcow2| qcow2.delete_snapshot(name));
        done.map_err(|error| {
            let why = if missing(&error) { "snapshot not found".to_owned() } else { error.to_string() };
            fail(format!("Could not delete snapshot '{name}': {why}"))
        })?;
    } else if let Some(qcow2) = qcow2 {
        let list = qcow2.snapshots().with_context(|| format!("cannot read {}", arguments.file.display()))?;
        print!("{}", show::snapshots(&list));
    }
    Ok(image.close()?)
}

/// Which images are believed: where a format is guessed, `follow` opens what they name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guesses {
    Follow,
    Refuse,
}

fn open_by(guesses: Guesses, source: &super::Source, file: &Path, how: OpenOptions) -> Result<Image> {
    match guesses {
        Guesses::Follow => open(source, file, how),
        Guesses::Refuse => {
            let (path, format) = super::named(source, file)?;
            Ok(Image::open(&path, OpenOptions { format, shared: source.force_share, ..how })?)
        }
    }
}

pub fn bitmap(arguments: &Bitmap, guesses: Guesses) -> Result<()> {
    let name = arguments.bitmap.as_str();
    if arguments.granularity.is_some() && !arguments.add {
        return Err(fail("granularity only supported with --add"));
    }
    let granularity = arguments.granularity.as_ref().map(|text| size(text, "Invalid granularity specified."));
    let mut changes: Vec<(&str, Change<'_>)> = Vec::new();
    let mut add = |wanted: bool, what: &'static str, change: Change<'static>| {
        if wanted {
            changes.push((what, change));
        }
    };
    add(arguments.add, "add", Change::Add(granularity.transpose()?));
    add(arguments.clear, "clear", Change::Clear);
    add(arguments.disable, "disable", Change::Record(false));
    add(arguments.enable, "enable", Change::Record(true));
    add(arguments.remove, "remove", Change::Remove);
    if changes.is_empty() && arguments.merge.is_empty() {
        return Err(fail("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"));
    }
    // Bitmaps are about this image alone.
    let how = OpenOptions { alone: true, ..OpenOptions::default() };
    let image = open_by(guesses, &arguments.source, &arguments.file, how)?;
    let failed = |what: &str, why: &dyn std::fmt::Display| {
        fail(format!("Operation {what} on bitmap {name} failed: {why}"))
    };
    let first = changes.first().map_or("merge", |(what, _)| *what);
    let no_bitmaps = || failed(first, &format!("{} images have no bitmaps; qcow2 images have", image.format));
    let qcow2 = image.qcow2.as_ref().ok_or_else(no_bitmaps)?;
    for (what, change) in changes {
        qcow2.change_bitmap(name, change).map_err(|error| failed(what, &error))?;
    }
    for from in &arguments.merge {
        let bits = match &arguments.source_file {
            None => qcow2.bitmap_bits(from),
            Some(file) => {
                let source =
                    super::Source { format: arguments.source_format.clone(), ..arguments.source.clone() };
                let other = open_by(guesses, &source, file, OpenOptions { alone: true, ..super::reading() })?;
                other.as_qcow2("bitmaps")?.bitmap_bits(from)
            }
        };
        let merged = bits.and_then(|bits| qcow2.change_bitmap(name, Change::Merge(&bits)));
        merged.map_err(|error| failed("merge", &error))?;
    }
    Ok(image.close()?)
}

pub fn bench(arguments: &Bench, guesses: Guesses) -> Result<()> {
    let bytes = |text: &str, what: &str| size(text, &format!("Invalid {what} specified."));
    let len = bytes(&arguments.buffer_size, "buffer size")?;
    if len == 0 || len > 1 << 30 {
        return Err(fail("Invalid buffer size specified."));
    }
    let step = arguments.step_size.as_ref().map(|text| bytes(text, "step size")).transpose()?.unwrap_or(len);
    let load = Load {
        count: arguments.count,
        depth: arguments.depth.clamp(1, 1024),
        offset: bytes(&arguments.offset, "offset")?,
        len,
        step,
        write: arguments.write.then_some(arguments.pattern),
        flush_interval: arguments.flush_interval,
    };
    if !arguments.write && load.flush_interval > 0 {
        return Err(fail("--flush-interval is only available in write tests"));
    }
    if load.flush_interval > 0 && load.flush_interval < load.depth as u64 {
        return Err(fail("Flush interval can't be smaller than depth"));
    }
    let how = OpenOptions {
        read_only: !arguments.write,
        cache: super::cache(arguments.cache.as_deref())?,
        ..OpenOptions::default()
    };
    let image = open_by(guesses, &arguments.source, &arguments.file, how)?;
    if !arguments.quiet {
        let what = if arguments.write { "write" } else { "read" };
        println!(
            "Sending {} {what} requests, {len} bytes each, {} in parallel (starting at offset {}, step size {step})",
            load.count, load.depth, load.offset
        );
        if load.flush_interval > 0 {
            println!("Sending flush every {} requests", load.flush_interval);
        }
    }
    let took =
        super::chain::with_progress(false, 0, |progress| job::bench(image.disk.as_ref(), load, progress))
            .map_err(|error| {
                if crate::signals::cancelled() { error } else { fail(format!("Failed request: {error:#}")) }
            })?;
    if !arguments.quiet {
        println!("Run completed in {:.3} seconds.", took.as_secs_f64());
    }
    Ok(image.close()?)
}
