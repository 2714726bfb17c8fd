//! What only looks at images: info, check, map, compare, measure.

use super::super::report;
use super::arguments::{Check, Compare, Info, Map, Measure};
use super::{as_json, cache, fail, named, open, reading, size, text};
use crate::exit::with_code;
use crate::image::{CHECK_CORRUPT, CHECK_LEAKS, CHECK_UNSUPPORTED, DIFFERENT, options::New};
use anyhow::{Context, Result};
use image::format::qcow2::{Preallocation, Snapshot};
use image::format::{Findings, Format, Repair};
use image::job::Difference;
use image::{Content, Disk, Image, OpenOptions};
use serde::Serialize;
use serde_json::Value;
use std::fmt::Write;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// JSON with four spaces, as it is there.
fn print_json(value: &impl Serialize) -> Result<()> {
    let mut bytes = Vec::new();
    let form = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, form))?;
    println!("{}", String::from_utf8_lossy(&bytes));
    Ok(())
}

pub fn info(arguments: &Info) -> Result<()> {
    let json = as_json(&arguments.output)?;
    let chain = arguments.backing_chain;
    let top = open(&arguments.source, &arguments.file, OpenOptions { alone: !chain, ..reading() })?;
    let mut images = vec![&top];
    while let Some(below) = images.last().and_then(|image| image.backing.as_deref()) {
        images.push(below);
    }
    let mut reports = Vec::new();
    for image in images {
        let mut report = report::info(image)?;
        if image.format == Format::Vhd && report.get("cluster-size").is_none() {
            // A fixed one has no blocks.
            report.as_object_mut().map(|report| report.remove("format-specific"));
        }
        reports.push((report, image));
    }
    if json {
        let reports: Vec<&Value> = reports.iter().map(|(report, _)| report).collect();
        return if chain { print_json(&reports) } else { print_json(&reports.first()) };
    }
    let texts = reports.iter().map(|(report, image)| info_text(report, image)).collect::<Result<Vec<_>>>()?;
    print!("{}", texts.join("\n"));
    Ok(())
}

fn info_text(report: &Value, image: &Image) -> Result<String> {
    let mut text = String::new();
    let word = |name: &str| report.get(name).and_then(Value::as_str).map(report::shown);
    let number = |name: &str| report.get(name).and_then(Value::as_u64);
    let capacity = number("virtual-size").unwrap_or(0);
    writeln!(text, "image: {}", word("filename").unwrap_or_default())?;
    writeln!(text, "file format: {}", word("format").unwrap_or_default())?;
    writeln!(text, "virtual size: {} ({capacity} bytes)", text::size(capacity))?;
    let taken = number("actual-size").map_or("unavailable".to_owned(), text::size);
    writeln!(text, "disk size: {taken}")?;
    if let Some(bytes) = number("cluster-size") {
        writeln!(text, "cluster_size: {bytes}")?;
    }
    if report.get("dirty-flag") == Some(&Value::Bool(true)) {
        writeln!(text, "cleanly shut down: no")?;
    }
    if let Some(name) = word("backing-filename") {
        match word("full-backing-filename") {
            Some(full) if full == name => writeln!(text, "backing file: {name}")?,
            Some(full) => writeln!(text, "backing file: {name} (actual path: {full})")?,
            None => writeln!(text, "backing file: {name} (cannot determine actual path)")?,
        }
    }
    if let Some(format) = word("backing-filename-format") {
        writeln!(text, "backing file format: {format}")?;
    }
    if let Some(qcow2) = &image.qcow2 {
        let list = qcow2.snapshots().with_context(|| format!("cannot read {}", image.path.display()))?;
        text.push_str(&snapshots(&list));
    }
    if let Some(data) = report.pointer("/format-specific/data").and_then(Value::as_object) {
        writeln!(text, "Format specific information:")?;
        ORDER
            .iter()
            .filter_map(|name| Some((name, data.get(*name)?)))
            .try_for_each(|(name, value)| tree(&mut text, 1, &name.replace('-', " "), value))?;
    }
    Ok(text)
}

/// Facts of a format, in their order.
const ORDER: [&str; 13] = [
    "compat",
    "compression-type",
    "lazy-refcounts",
    "bitmaps",
    "refcount-bits",
    "data-file",
    "data-file-raw",
    "corrupt",
    "extended-l2",
    "cid",
    "parent-cid",
    "create-type",
    "extents",
];

fn tree(text: &mut String, depth: usize, name: &str, value: &Value) -> std::fmt::Result {
    let indent = " ".repeat(4 * depth);
    match value {
        Value::Array(list) => {
            writeln!(text, "{indent}{name}:")?;
            let mut items = list.iter().enumerate();
            items.try_for_each(|(number, value)| tree(text, depth + 1, &format!("[{number}]"), value))
        }
        Value::Object(fields) => {
            writeln!(text, "{indent}{name}:")?;
            let mut fields: Vec<(&String, &Value)> = fields.iter().collect();
            fields.sort_by_key(|(name, _)| *name == "granularity");
            let mut fields = fields.into_iter();
            fields.try_for_each(|(name, value)| tree(text, depth + 1, &name.replace('-', " "), value))
        }
        Value::String(word) => writeln!(text, "{indent}{name}: {}", report::shown(word)),
        other => writeln!(text, "{indent}{name}: {other}"),
    }
}

/// The list of snapshots; nothing if there are none.
pub fn snapshots(list: &[Snapshot]) -> String {
    if list.is_empty() {
        return String::new();
    }
    let row = |cells: [&str; 6]| {
        let [id, name, bytes, date, clock, count] = cells;
        // A name that is too long moves the rest.
        format!("{id:<9} {name:<16} {bytes:>8}{date:>20}{clock:>13}{count:>11}\n")
    };
    let head = format!(
        "{:<10}{:<17}{:>8}{:>20}{:>13}{:>11}\n",
        "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"
    );
    let rows = list.iter().map(|snapshot| {
        let count = snapshot.icount.map_or(String::new(), |count| count.to_string());
        row([
            &report::shown(&snapshot.id),
            &report::shown(&snapshot.name),
            &text::size(snapshot.vm_state),
            &report::date(snapshot.date.0.into()),
            &text::clock(Duration::from_nanos(snapshot.vm_clock)),
            &count,
        ])
    });
    std::iter::once("Snapshot list:\n".to_owned()).chain([head]).chain(rows).collect()
}

pub fn check(arguments: &Check) -> Result<u8> {
    let json = as_json(&arguments.output)?;
    let repair = match arguments.repair.as_deref() {
        None => Repair::Nothing,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            let text = format!("Unknown option value for -r (expecting 'leaks' or 'all'): {other}");
            return Err(fail(format!("{text}\nTry 'qemu-img --help' for more information")));
        }
    };
    let how = OpenOptions {
        read_only: repair == Repair::Nothing,
        alone: true,
        cache: cache(arguments.cache.as_deref())?,
        shared: arguments.source.force_share,
        follow_guess: true,
        ..OpenOptions::default()
    };
    let (path, format) = named(&arguments.source, &arguments.file)?;
    let image = Image::open_for_repair(&path, OpenOptions { format, ..how })?;
    let checked = image
        .container
        .as_ref()
        .filter(|_| matches!(image.format, Format::Qcow2 | Format::Qed | Format::Vhdx | Format::Vmdk));
    let Some(container) = checked else {
        return Err(with_code(CHECK_UNSUPPORTED, "This image format does not support checks"));
    };
    let found = container.check(repair)?;
    image.close()?;
    found.messages.iter().for_each(|message| eprintln!("{}", report::shown(message)));
    if json {
        print_json(&check_json(&image, &found))?;
    } else if !arguments.quiet {
        print!("{}", check_text(&found, image.format));
    }
    Ok(match (found.corruptions, found.leaks, found.errors) {
        (_, _, 1..) => {
            eprintln!("qemu-img: Check failed");
            1
        }
        (1.., _, _) => CHECK_CORRUPT,
        (_, 1.., _) => CHECK_LEAKS,
        _ => 0,
    })
}

fn check_json(image: &Image, found: &Findings) -> Value {
    let mut report = report::check(image, found);
    if let Some(fields) = report.as_object_mut() {
        fields.remove("messages");
        let zero = |value: &Value| value.as_u64() == Some(0);
        // What is nothing is not there, but for the errors.
        fields.retain(|name, value| name == "check-errors" || !zero(value));
        if image.format == Format::Qed {
            fields.remove("image-end-offset");
        }
    }
    report
}

fn check_text(found: &Findings, format: Format) -> String {
    let mut text = String::new();
    if found.corruptions_fixed > 0 || found.leaks_fixed > 0 {
        let _ = write!(
            text,
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} \
             corruptions\n\nDouble checking the fixed image now...\n",
            found.leaks_fixed, found.corruptions_fixed
        );
    }
    if found.is_clean() {
        text.push_str("No errors were found on the image.\n");
    }
    if found.corruptions > 0 {
        let _ = write!(
            text,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may \
             corrupt it.\n",
            found.corruptions
        );
    }
    if found.leaks > 0 {
        let _ = write!(
            text,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            found.leaks
        );
    }
    if found.errors > 0 {
        let _ = writeln!(text, "\n{} internal errors have occurred during the check.", found.errors);
    }
    if found.total_clusters > 0 && found.allocated_clusters > 0 {
        let part = |of: u64, all: u64| 100.0 * of as f64 / all as f64;
        let _ = writeln!(
            text,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            found.allocated_clusters,
            found.total_clusters,
            part(found.allocated_clusters, found.total_clusters),
            part(found.fragmented_clusters, found.allocated_clusters),
            part(found.compressed_clusters, found.allocated_clusters)
        );
    }
    if format == Format::Qcow2 && found.image_end_offset > 0 {
        let _ = writeln!(text, "Image end offset: {}", found.image_end_offset);
    }
    text
}

pub fn map(arguments: &Map) -> Result<()> {
    let json = as_json(&arguments.output)?;
    let number = |text: &Option<String>, usual: u64| {
        text.as_ref().map_or(Ok(usual), |text| size(text, "Invalid size specified."))
    };
    let (from, len) = (number(&arguments.start_offset, 0)?, number(&arguments.max_length, u64::MAX)?);
    let image = open(&arguments.source, &arguments.file, reading())?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    if json {
        let mut first = true;
        report::each_extent(&image, from, len, |start, status| {
            let data = status.content == Content::Data;
            // There a VHD knows no difference between nothing and zeroes.
            let present = status.present || image.format == Format::Vhd;
            let place = status.offset.map_or(String::new(), |at| format!(", \"offset\": {at}"));
            let before = if std::mem::take(&mut first) { "[" } else { ",\n" };
            Ok(write!(
                out,
                "{before}{{ \"start\": {start}, \"length\": {}, \"depth\": {}, \"present\": {present}, \"zero\": {}, \
                 \"data\": {data}{place}}}",
                status.len, status.depth, !data
            )?)
        })?;
        writeln!(out, "{}]", if first { "[" } else { "" })?;
        return Ok(out.flush()?);
    }
    writeln!(out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to")?;
    let hex = |number: u64| if number == 0 { "0".to_owned() } else { format!("{number:#x}") };
    report::each_extent(&image, from, len, |start, status| {
        if status.content != Content::Data {
            return Ok(());
        }
        let Some(place) = status.offset else {
            return Err(fail("File contains external, encrypted or compressed clusters."));
        };
        let file = report::owner(&image, status).path.display();
        Ok(writeln!(out, "{:<16}{:<16}{:<16}{file}", hex(start), hex(status.len), hex(place))?)
    })?;
    Ok(out.flush()?)
}

pub fn compare(arguments: &Compare) -> Result<u8> {
    let cache = cache(arguments.cache.as_deref())?;
    let how = OpenOptions { cache, ..reading() };
    let first = open(&arguments.source, &arguments.first, how)?;
    let source = super::Source { format: arguments.second_format.clone(), ..arguments.source.clone() };
    let second = open(&source, &arguments.second, how)?;
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
    let found = super::chain::with_progress(arguments.progress, a.max(b), |progress| {
        image::job::compare(first.disk.as_ref(), second.disk.as_ref(), image::job::usual_threads(), progress)
    });
    let found = found.map_err(|error| with_code(4, format!("Error while reading: {error:#}")))?;
    if arguments.strict
        && let Some(place) = stored_otherwise(first.disk.as_ref(), second.disk.as_ref())?
        && !matches!(found, Difference::Content(at) if at < place)
    {
        say(&format!("Strict mode: Offset {place} block status mismatch!"));
        return Ok(DIFFERENT);
    }
    let code = match found {
        Difference::None => {
            if a != b {
                say("Warning: Image size mismatch!");
            }
            say("Images are identical.");
            0
        }
        Difference::Content(at) | Difference::Size(at) => {
            if matches!(found, Difference::Size(_)) {
                say("Warning: Image size mismatch!");
            }
            say(&format!("Content mismatch at offset {}!", at / 512 * 512));
            DIFFERENT
        }
    };
    if arguments.progress {
        println!();
    }
    Ok(code)
}

/// The first place that two disks of one size store in different ways.
fn stored_otherwise(a: &dyn Disk, b: &dyn Disk) -> Result<Option<u64>> {
    let kind =
        |status: &image::Status| (status.content, status.present, status.offset.is_some(), status.compressed);
    let mut at = 0u64;
    while at < a.capacity() {
        let (left, right) = (a.block_status(at, a.capacity() - at)?, b.block_status(at, a.capacity() - at)?);
        if kind(&left) != kind(&right) {
            return Ok(Some(at));
        }
        at += left.len.min(right.len).max(1);
    }
    Ok(None)
}

pub fn measure(arguments: &Measure) -> Result<()> {
    let json = as_json(&arguments.output)?;
    let format: Format = arguments
        .target_format
        .parse()
        .map_err(|_| fail(format!("Unknown file format '{}'", arguments.target_format)))?;
    let said = arguments.size.as_ref().map(|text| size(text, "Invalid image size specified.")).transpose()?;
    let (image, said) = match (&arguments.file, said) {
        (Some(_), Some(_)) => return Err(fail("--size N cannot be used together with a filename.")),
        (None, None) => return Err(fail("Either --size N or one filename must be specified.")),
        (Some(file), None) => (Some(open(&arguments.source, file, reading())?), 0),
        (None, Some(said)) => (None, said),
    };
    if !matches!(format, Format::Raw | Format::Qcow2) {
        return Err(fail(format!("Block driver '{format}' does not support size measurement")));
    }
    let mut new = New::parse(format, &arguments.options).map_err(|error| fail(error.to_string()))?;
    let disk: Option<Arc<dyn Disk>> = match (&image, &arguments.snapshot) {
        (None, _) => None,
        (Some(image), None) => Some(image.disk.clone()),
        (Some(image), Some(name)) => Some(super::chain::at_snapshot(image, name)?),
    };
    let bytes = disk.as_ref().map_or(said, |disk| disk.capacity());
    new.size = bytes.checked_next_multiple_of(512).ok_or_else(|| fail("Invalid image size specified."))?;
    let (required, full) = match format {
        Format::Raw => (new.size, new.size),
        _ => image::job::measure(disk.as_deref(), &new.qcow2())?,
    };
    let required = if new.preallocation == Preallocation::Off { required } else { full };
    let bitmaps = image
        .as_ref()
        .and_then(|image| image.qcow2.as_ref())
        .filter(|qcow2| format == Format::Qcow2 && qcow2.header().version >= 3);
    let bitmaps = bitmaps
        .map(|qcow2| qcow2.bitmap_bytes(1 << (new.qcow2().cluster_bits & 63)))
        .transpose()
        .context("cannot read bitmaps")?;
    if json {
        let mut report = serde_json::json!({ "required": required, "fully-allocated": full });
        if let (Some(bytes), Some(fields)) = (bitmaps, report.as_object_mut()) {
            fields.insert("bitmaps".into(), bytes.into());
        }
        return print_json(&report);
    }
    println!("required size: {required}\nfully allocated size: {full}");
    if let Some(bytes) = bitmaps {
        println!("bitmaps size: {bytes}");
    }
    Ok(())
}

/// Whether two names are of one file.
pub fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
