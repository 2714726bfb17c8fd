//! What works on images and what lies below them: convert, rebase, commit; with progress as qemu-img shows it.

use super::super::options::{New, split};
use super::super::work::{Copying, below, check_snapshots, watched};
use super::arguments::{Commit, Convert, Rebase};
use super::{cache, fail, open, plain, reading, show::same_file, size};
use crate::signals;
use anyhow::{Context, Result};
use image::format::Format;
use image::job::{self, Progress};
use image::{Disk, Image, OpenOptions};
use std::io::{self, Write};
use std::sync::Arc;

fn print_percent(done: u64, total: u64) {
    print!(
        "    ({:.2}/100%)\r",
        if total == 0 { 100.0 } else { 100.0 * done.min(total) as f64 / total as f64 }
    );
    let _ = io::stdout().flush();
}

/// What follows the last percent.
fn end_progress(shown: bool) {
    if shown {
        println!();
    }
}

/// Runs a job on so many bytes and ends it when the user wants that.
pub fn with_progress<T: Send>(
    shown: bool,
    total: u64,
    job: impl FnOnce(&Progress) -> io::Result<T> + Send,
) -> Result<T> {
    let print = |done: u64| {
        if shown {
            print_percent(done, total);
        }
    };
    print(0);
    let result = watched(job, print);
    if shown && result.is_ok() {
        print_percent(1, 1);
    }
    match result {
        Err(_) if signals::cancelled() => Err(crate::exit::with_code(signals::cancelled_code(), "cancelled")),
        other => Ok(other?),
    }
}

/// The disk as it was when a snapshot was made: by its name or number, or `snapshot.name=` or `snapshot.id=` and that.
pub fn at_snapshot(image: &Image, said: &str) -> Result<Arc<dyn Disk>> {
    let name = said.strip_prefix("snapshot.name=").or(said.strip_prefix("snapshot.id=")).unwrap_or(said);
    let qcow2 =
        image.qcow2.as_ref().ok_or_else(|| fail("Failed to load snapshot: Operation not supported"))?;
    let there = qcow2.snapshots().context("cannot read snapshots")?;
    if there.iter().all(|snapshot| snapshot.name != name && snapshot.id != name) {
        return Err(fail("Failed to load snapshot: Can't find snapshot"));
    }
    Ok(Arc::new(qcow2.at_snapshot(name)?))
}

pub fn convert(arguments: &Convert) -> Result<()> {
    let (target_cache, source_cache) =
        (cache(arguments.cache.as_deref())?, cache(arguments.source_cache.as_deref())?);
    let sparse = size(&arguments.sparse, "Invalid buffer size for sparse output specified.")?;
    if arguments.threads.is_some_and(|threads| !(1..=16).contains(&threads)) {
        return Err(fail("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16"));
    }
    let format: Format = arguments
        .target_format
        .parse()
        .map_err(|_| fail(format!("Unknown file format '{}'", arguments.target_format)))?;
    if arguments.options.iter().flat_map(|list| split(list)).any(|option| option == "help") {
        println!("{}", super::options::help(format));
        return Ok(());
    }
    let Some((target, sources)) = arguments.files.split_last().filter(|(_, sources)| !sources.is_empty())
    else {
        return Err(fail("Must specify image file name"));
    };
    let how = OpenOptions { cache: source_cache, ..reading() };
    let images = sources.iter().map(|file| open(&arguments.source, file, how)).collect::<Result<Vec<_>>>()?;
    let disk: Arc<dyn Disk> = match (images.as_slice(), &arguments.snapshot) {
        ([image], None) => image.disk.clone(),
        ([image], Some(name)) => at_snapshot(image, name)?,
        (_, Some(_)) => return Err(fail("No support for concatenating multiple snapshot")),
        (many, None) => Arc::new(image::Row::new(many.iter().map(|image| image.disk.clone()).collect())),
    };
    if arguments.compress && format != Format::Qcow2 {
        return Err(fail("Compression not supported for this file format"));
    }
    let mut lists = arguments.options.clone();
    match (&arguments.backing, &arguments.backing_format) {
        (Some(name), Some(format)) => {
            lists.push(format!("backing_file={},backing_fmt={format}", name.replace(',', ",,")));
        }
        (Some(_), None) => return Err(fail("Use of backing file requires explicit backing format")),
        (None, _) => {}
    }
    let mut new = New::parse(format, &lists).map_err(|error| fail(error.to_string()))?;
    new.size = disk.capacity().checked_next_multiple_of(512).unwrap_or(0);
    if new.backing.as_ref().is_some_and(|(_, format)| format.parse::<Format>().is_err()) {
        return Err(fail("Use of backing file requires explicit backing format"));
    }
    let over = if arguments.no_create { None } else { below(target, &new)? };
    if !arguments.no_create && sources.iter().any(|file| same_file(file, target)) {
        return Err(fail(format!(
            "{}: error while converting {format}: source and target are one file",
            target.display()
        )));
    }
    let one_raw =
        images.len() == 1 && images.iter().all(|image| image.format == Format::Raw) && lists.is_empty();
    let copying = Copying {
        disk,
        new,
        over: over.map(|image| image.disk.clone()),
        compress: arguments.compress,
        threads: arguments.threads,
        sparse,
        cache: target_cache,
        share: arguments.copy_range,
        whole: sources.first().filter(|_| one_raw && format == Format::Raw && arguments.snapshot.is_none()),
    };
    let watch = |total: u64, job: &(dyn Fn(&Progress) -> io::Result<()> + Sync)| {
        with_progress(arguments.progress && !arguments.quiet, total, job)?;
        end_progress(arguments.progress && !arguments.quiet);
        Ok(())
    };
    let done = if arguments.no_create {
        copying.fill(target, arguments.target_is_zero, &watch)
    } else {
        copying.make_target(target, &watch)
    };
    done.map_err(|error| match error.downcast_ref::<image::Error>() {
        Some(_) => error,
        None if signals::cancelled() => error,
        None => fail(plain(&crate::sentence(&error))),
    })
}

pub fn rebase(arguments: &Rebase) -> Result<()> {
    if arguments.backing.is_none() && !arguments.blind {
        let text = "Must specify backing file (-b) or use unsafe mode (-u)";
        return Err(fail(format!("{text}\nTry 'qemu-img --help' for more information")));
    }
    let (top_cache, below_cache) =
        (cache(arguments.cache.as_deref())?, cache(arguments.source_cache.as_deref())?);
    let how = OpenOptions { alone: arguments.blind, cache: top_cache, ..OpenOptions::default() };
    let top = open(&arguments.source, &arguments.file, how)?;
    let container = top.container.as_ref().filter(|_| top.format.can_change_base());
    let container = container.ok_or_else(|| {
        fail(format!(
            "Could not change the backing file to '{}': Operation not supported",
            arguments.backing.as_deref().unwrap_or("")
        ))
    })?;
    let named = match (arguments.backing.as_deref(), &arguments.backing_format) {
        (None | Some(""), _) => None,
        (Some(name), Some(format)) => Some((name, super::format(&arguments.file, format)?)),
        (Some(_), None) => {
            return Err(fail(format!(
                "Could not change the backing file to '{}': backing format must be specified",
                arguments.backing.as_deref().unwrap_or("")
            )));
        }
    };
    if !arguments.blind {
        check_snapshots(&top)?;
        let new = match named {
            Some((name, format)) => {
                let how = OpenOptions { format: Some(format), cache: below_cache, ..reading() };
                let place = image::beside(&arguments.file, name)?;
                Some(Image::open(&place, how)?)
            }
            None => None,
        };
        with_progress(arguments.progress && !arguments.quiet, top.disk.capacity(), |progress| {
            let new = new.as_ref().map(|image| image.disk.as_ref());
            let cluster = container.facts().cluster_size.unwrap_or(1 << 16);
            job::rebase(top.disk.as_ref(), cluster, new, job::usual_threads(), progress)
        })?;
        end_progress(arguments.progress && !arguments.quiet);
    }
    container.set_backing(named).with_context(|| format!("Could not change {}", arguments.file.display()))?;
    Ok(top.close()?)
}

pub fn commit(arguments: &Commit) -> Result<()> {
    let cache = cache(arguments.cache.as_deref())?;
    let (base, base_format) = {
        let top = open(&arguments.source, &arguments.file, reading())?;
        let below = top.backing.as_deref().ok_or_else(|| fail("Image does not have a backing file"))?;
        (below.path.clone(), below.format)
    };
    let alone = OpenOptions { alone: true, cache, ..OpenOptions::default() };
    let top = open(&arguments.source, &arguments.file, alone)?;
    let container = top.as_container("backing files")?;
    check_snapshots(&top)?;
    let below = Image::open(
        &base,
        OpenOptions { format: Some(base_format), cache, follow_guess: true, ..OpenOptions::default() },
    )?;
    let capacity = top.disk.capacity();
    if below.disk.capacity() < capacity {
        below.disk.resize(capacity).with_context(|| format!("cannot make {} larger", base.display()))?;
    }
    with_progress(arguments.progress && !arguments.quiet, capacity, |progress| {
        job::commit(top.disk.as_ref(), below.disk.as_ref(), job::usual_threads(), progress)
    })?;
    end_progress(arguments.progress && !arguments.quiet);
    below.close()?;
    if !arguments.keep {
        container.empty().with_context(|| format!("cannot empty {}", arguments.file.display()))?;
    }
    if !arguments.quiet {
        println!("Image committed.");
    }
    Ok(top.close()?)
}
