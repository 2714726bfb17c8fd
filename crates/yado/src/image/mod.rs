//! `yado image`: images made, looked at, copied and repaired.

pub mod arguments;
mod dedup;
mod options;
pub mod qemu_img;
pub mod qemu_nbd;
mod replace;
mod report;
mod serve;
mod work;

use crate::exit::with_code;
use crate::size::Size;
use anyhow::{Context, Result};
use arguments::{Check, Command, Compare, Create, Info, Map, Measure, RepairWhat, Resize, Snapshot};
use image::format::qcow2::Preallocation;
use image::format::{Format, Repair};
use image::{Image, OpenOptions};
use options::{New, usage};
use qemu_img::make::Guesses;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Exit codes of `check`, as qemu-img has them.
const CHECK_CORRUPT: u8 = 2;
const CHECK_LEAKS: u8 = 3;
const CHECK_UNSUPPORTED: u8 = 63;
/// Exit code of `compare` where images differ.
const DIFFERENT: u8 = 1;

/// Runs a command; answers the exit code.
pub fn run(command: arguments::Image) -> Result<u8> {
    // Ctrl-C ends a job in order, and everything else at once.
    crate::signals::install_for_jobs().context("cannot catch signals")?;
    match command.command {
        Command::Create(options) => create(&options)?,
        Command::Info(options) => info(&options)?,
        Command::Check(options) => return check(&options),
        Command::Convert(options) => work::convert(&options)?,
        Command::Resize(options) => resize(&options)?,
        Command::Map(options) => map(&options)?,
        Command::Compare(options) => return compare(&options),
        Command::Snapshot(options) => snapshot(&options)?,
        Command::Rebase(options) => work::rebase(&options)?,
        Command::Commit(options) => work::commit(&options)?,
        Command::Measure(options) => measure(&options)?,
        Command::Bitmap(options) => qemu_img::make::bitmap(&options, Guesses::Refuse)?,
        Command::Bench(options) => qemu_img::make::bench(&options, Guesses::Refuse)?,
        Command::Clone(options) => work::clone(&options)?,
        Command::Dedup(options) => dedup::dedup(&options)?,
        Command::Serve(options) => serve::serve(&options)?,
    }
    Ok(0)
}

/// Opens an image in the format that was said, if one was.
fn open(file: &Path, format: Option<&str>, how: OpenOptions) -> Result<Image> {
    let format = format.map(options::format).transpose()?;
    Ok(Image::open(file, OpenOptions { format, ..how })?)
}

/// For reading only.
fn reading(shared: bool) -> OpenOptions {
    OpenOptions { read_only: true, shared, ..OpenOptions::default() }
}

fn create(arguments: &Create) -> Result<()> {
    let format = options::format(&arguments.format)?;
    if arguments.options.iter().any(|list| list == "help") {
        println!("{}", options::help(format));
        return Ok(());
    }
    let mut new = New::parse(format, &arguments.options)?;
    if let Some(name) = &arguments.backing {
        new.backing = Some((name.clone(), arguments.backing_format.clone().unwrap_or_default()));
    }
    let mut size = arguments.size.map(|size| size.0).or(Some(new.size).filter(|size| *size > 0));
    if let Some((name, below)) = &new.backing {
        if !format.can_build_on(below.parse().ok()) {
            return Err(usage(match (format, below.as_str()) {
                (Format::Raw, _) => "raw images build on no other: use -f qcow2".to_owned(),
                (_, "") => format!("say the format of {name} with -F: it is written into the new image"),
                (_, below) => format!("{format} images cannot build on {below} images: use -f qcow2"),
            }));
        }
        let place = image::beside(&arguments.file, name)?;
        let below = open(&place, Some(below), reading(false))?;
        size = size.or(Some(below.disk.capacity()));
    }
    let size = size.ok_or_else(|| usage("how large? give a size such as 10G"))?;
    new.size = size.checked_next_multiple_of(512).ok_or_else(|| usage("that size is too large"))?;
    if !arguments.quiet {
        println!("Making {}: {}, {}", arguments.file.display(), new.format, Size(new.size));
    }
    let existed = arguments.file.exists();
    let _unfinished = (!existed).then(|| crate::signals::unfinished(&arguments.file));
    make(&arguments.file, &new).inspect_err(|_| {
        if !existed {
            // Nothing half made is left.
            let _ = std::fs::remove_file(&arguments.file);
        }
    })
}

/// Makes an image, closed.
fn make(file: &Path, new: &New) -> Result<()> {
    match new.format {
        Format::Raw => drop(image::create_raw(file, new.size, new.preallocation)?),
        Format::Qcow2 => image::create_qcow2(file, &new.qcow2())?.close()?,
        Format::Qed => image::create_qed(file, &new.qed()?)?.close()?,
        Format::Vhd => {
            let parent = new.backing.as_ref().map(|(name, _)| name.as_str());
            image::create_vhd(file, &new.vhd(), parent)?.close()?;
        }
        Format::Vhdx | Format::Vmdk => return Err(usage(format!("{} images are only read", new.format))),
    }
    Ok(())
}

fn info(arguments: &Info) -> Result<()> {
    // The names are shown; what they name is opened only where the chain is asked for.
    let chain = arguments.backing_chain;
    let how = OpenOptions { alone: !chain, ..reading(arguments.force_share) };
    let top = open(&arguments.file, arguments.format.as_deref(), how)?;
    let mut images = vec![&top];
    while let Some(below) = images.last().and_then(|image| image.backing.as_deref()) {
        images.push(below);
    }
    let reports = images.iter().map(|image| report::info(image)).collect::<Result<Vec<_>>>()?;
    match (arguments.shown.as_json(), chain) {
        (true, true) => print_json(&reports),
        (true, false) => reports.first().map_or(Ok(()), print_json),
        (false, _) => {
            let texts: Vec<String> = reports.iter().map(report::info_text).collect();
            print!("{}", texts.join("\n"));
            Ok(())
        }
    }
}

fn print_json(value: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

fn check(arguments: &Check) -> Result<u8> {
    let repair = match arguments.repair.or(arguments.what) {
        None => Repair::Nothing,
        Some(RepairWhat::Leaks) => Repair::Leaks,
        Some(RepairWhat::All) => Repair::All,
    };
    let read_only = repair == Repair::Nothing;
    let how = OpenOptions { read_only, alone: true, shared: arguments.force_share, ..OpenOptions::default() };
    let format = arguments.format.as_deref().map(options::format).transpose()?;
    let image = Image::open_for_repair(&arguments.file, OpenOptions { format, ..how })?;
    let Some(container) = &image.container else {
        let text = format!("{} images have nothing that can be checked", image.format);
        return Err(with_code(CHECK_UNSUPPORTED, text));
    };
    let found = container.check(repair)?;
    image.close()?;
    if arguments.shown.as_json() {
        print_json(&report::check(&image, &found))?;
    } else {
        found.messages.iter().for_each(|message| eprintln!("{message}"));
        if !arguments.quiet {
            print!("{}", report::check_text(&found));
        }
    }
    Ok(match (found.corruptions, found.leaks, found.errors) {
        (_, _, 1..) => 1,
        (1.., _, _) => CHECK_CORRUPT,
        (_, 1.., _) => CHECK_LEAKS,
        _ => 0,
    })
}

/// A size that may be relative to another.
fn new_size(text: &str, now: u64) -> Result<u64> {
    let parse = |text: &str| text.parse::<Size>().map(|size| size.0).map_err(usage);
    let size = match text.split_at_checked(1) {
        Some(("+", more)) => now.checked_add(parse(more)?),
        Some(("-", less)) => now.checked_sub(parse(less)?),
        _ => Some(parse(text)?),
    };
    let size = size.and_then(|size| size.checked_next_multiple_of(512));
    size.ok_or_else(|| usage(format!("{text} is no size for a disk of {now} bytes")))
}

fn resize(arguments: &Resize) -> Result<()> {
    let image = open(&arguments.file, arguments.format.as_deref(), OpenOptions::default())?;
    let now = image.disk.capacity();
    let size = new_size(&arguments.size, now)?;
    if size < now && !arguments.shrink {
        return Err(usage(format!(
            "the disk would lose its last {}: make what is on it smaller first, then say --shrink",
            Size(now - size)
        )));
    }
    image.disk.resize(size).with_context(|| format!("cannot resize {}", arguments.file.display()))?;
    image.close()?;
    if !arguments.quiet {
        println!("Image resized.");
    }
    Ok(())
}

fn map(arguments: &Map) -> Result<()> {
    let image = open(&arguments.file, arguments.format.as_deref(), reading(arguments.force_share))?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    match arguments.shown.as_json() {
        true => report::map(&image, &mut out)?,
        false => report::map_text(&image, &mut out)?,
    }
    Ok(out.flush()?)
}

fn compare(arguments: &Compare) -> Result<u8> {
    let how = reading(arguments.force_share);
    let first = open(&arguments.first, arguments.format.as_deref(), how)?;
    let second = open(&arguments.second, arguments.second_format.as_deref(), how)?;
    let say = |text: &str| {
        if !arguments.quiet {
            println!("{text}");
        }
    };
    let (a, b) = (first.disk.capacity(), second.disk.capacity());
    if a != b && arguments.strict {
        say("Strict mode: Image size mismatch!");
        return Ok(DIFFERENT);
    }
    let show = work::Show { name: "comparing", total: a.max(b), quiet: arguments.quiet };
    let found = work::with_progress(show, |progress| {
        image::job::compare(first.disk.as_ref(), second.disk.as_ref(), image::job::usual_threads(), progress)
    })?;
    match found {
        image::job::Difference::None => {
            if a != b {
                say("Warning: Image size mismatch!");
            }
            say("Images are identical.");
            Ok(0)
        }
        image::job::Difference::Content(at) | image::job::Difference::Size(at) => {
            say(&format!("Content mismatch at offset {at}!"));
            Ok(DIFFERENT)
        }
    }
}

fn snapshot(arguments: &Snapshot) -> Result<()> {
    let changes = arguments.create.is_some() || arguments.apply.is_some() || arguments.delete.is_some();
    // Internal snapshots are about this image alone.
    let how = OpenOptions {
        read_only: !changes,
        alone: true,
        shared: arguments.force_share,
        ..OpenOptions::default()
    };
    let image = open(&arguments.file, arguments.format.as_deref(), how)?;
    let qcow2 = image.as_qcow2("internal snapshots")?;
    let file = arguments.file.display();
    if let Some(name) = &arguments.create {
        qcow2.create_snapshot(name, 0, 0).with_context(|| format!("cannot make a snapshot in {file}"))?;
    } else if let Some(name) = &arguments.apply {
        qcow2.apply_snapshot(name).with_context(|| format!("cannot go back in {file}"))?;
    } else if let Some(name) = &arguments.delete {
        qcow2.delete_snapshot(name).with_context(|| format!("cannot delete a snapshot in {file}"))?;
    } else {
        let list = qcow2.snapshots().with_context(|| format!("cannot read {file}"))?;
        if arguments.json {
            print_json(&report::snapshots(&list))?;
        } else if !list.is_empty() {
            print!("{}", report::snapshots_text(&list));
        }
    }
    Ok(image.close()?)
}

fn measure(arguments: &Measure) -> Result<()> {
    let format = options::format(&arguments.target_format)?;
    let mut new = New::parse(format, &arguments.options)?;
    let source = match &arguments.file {
        Some(file) => Some(open(file, arguments.format.as_deref(), reading(false))?),
        None => None,
    };
    let size = source.as_ref().map(|image| image.disk.capacity()).or(arguments.size.map(|size| size.0));
    new.size = size.unwrap_or(0).checked_next_multiple_of(512).unwrap_or(0);
    let source = source.as_ref().map(|image| image.disk.as_ref());
    let (required, full) = match format {
        Format::Raw => (new.size, new.size),
        Format::Qcow2 => image::job::measure(source, &new.qcow2())?,
        Format::Qed => image::job::measure_qed(source, &new.qed()?)?,
        Format::Vhd => image::job::measure_vhd(source, &new.vhd())?,
        Format::Vhdx | Format::Vmdk => return Err(usage(format!("{format} images are only read"))),
    };
    let required = if new.preallocation == Preallocation::Off { required } else { full };
    if arguments.shown.as_json() {
        return print_json(&serde_json::json!({ "required": required, "fully-allocated": full }));
    }
    println!("required size: {required}\nfully allocated size: {full}");
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn sizes_may_be_relative() {
        assert_eq!(new_size("+1G", 1 << 30).unwrap(), 2 << 30);
        assert_eq!(new_size("-1K", 2048).unwrap(), 1024);
        assert_eq!(new_size("1000", 7).unwrap(), 1024);
        assert!(new_size("-3K", 2048).is_err());
        assert!(new_size("+much", 2048).is_err());
    }
}
