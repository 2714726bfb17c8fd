//! What `yado image` prints, in qemu-img's forms where they overlap.

use crate::exit::with_code;
use crate::signals;
use crate::size::Size;
use anyhow::{Context, Result};
use image::format::qcow2::Snapshot;
use image::format::{Fact, Findings};
use image::{Content, Image, Status};
use serde::Serializer as _;
use serde::ser::SerializeSeq;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::io;
use std::time::Duration;

/// `info`, as qemu-img's JSON has it.
pub fn info(image: &Image) -> Result<Value> {
    let mut report = Map::new();
    let mut set = |name: &str, value: Value| report.insert(name.to_owned(), value);
    set("filename", json!(image.path));
    set("format", json!(image.format.name()));
    set("virtual-size", json!(image.disk.capacity()));
    set("actual-size", json!(image.storage.allocated()));
    set("dirty-flag", json!(false));
    if let Some(container) = &image.container {
        let facts = container.facts();
        if let Some(bytes) = facts.cluster_size {
            set("cluster-size", json!(bytes));
        }
        set("dirty-flag", json!(facts.dirty));
        if let Some((name, format)) = &facts.backing {
            set("backing-filename", json!(name));
            if let Ok(path) = image::beside(&image.path, name) {
                set("full-backing-filename", json!(path));
            }
            if let Some(format) = format {
                set("backing-filename-format", json!(format));
            }
        }
        if !facts.details.is_empty() {
            let data: Map<String, Value> =
                facts.details.into_iter().map(|(name, fact)| (name.to_owned(), value(fact))).collect();
            set("format-specific", json!({ "type": image.format.name(), "data": data }));
        }
    }
    if let Some(qcow2) = &image.qcow2 {
        let list = qcow2.snapshots().with_context(|| format!("cannot read {}", image.path.display()))?;
        if !list.is_empty() {
            set("snapshots", snapshots(&list));
        }
    }
    Ok(Value::Object(report))
}

fn value(fact: Fact) -> Value {
    match fact {
        Fact::Flag(flag) => json!(flag),
        Fact::Number(number) => json!(number),
        Fact::Text(text) => json!(text),
        Fact::List(list) => list.into_iter().map(value).collect(),
        Fact::Row(row) => row.into_iter().map(|(name, fact)| (name.to_owned(), value(fact))).collect(),
    }
}

/// Text from inside an image, for a terminal: what would be an order to it is shown instead.
pub fn shown(text: &str) -> String {
    let escape = |letter: char| {
        if letter.is_control() { letter.escape_default().collect() } else { letter.to_string() }
    };
    text.chars().map(escape).collect()
}

/// `info` for people.
pub fn info_text(report: &Value) -> String {
    let mut text = String::new();
    let words = |value: &Value| value.as_str().map_or_else(|| value.to_string(), shown);
    let size = |name: &str| report.get(name).and_then(Value::as_u64);
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name}: {value}");
    };
    line("image", report.get("filename").map(words).unwrap_or_default());
    line("file format", report.get("format").map(words).unwrap_or_default());
    if let Some(bytes) = size("virtual-size") {
        line("virtual size", format!("{} ({bytes} bytes)", Size(bytes)));
    }
    if let Some(bytes) = size("actual-size") {
        line("disk size", Size(bytes).to_string());
    }
    if let Some(bytes) = size("cluster-size") {
        line("cluster_size", bytes.to_string());
    }
    if report.get("dirty-flag") == Some(&Value::Bool(true)) {
        line("cleanly shut down", "no".into());
    }
    if let Some(name) = report.get("backing-filename") {
        line("backing file", words(name));
    }
    if let Some(name) = report.get("backing-filename-format") {
        line("backing file format", words(name));
    }
    if let Some(list) = report.get("snapshots").and_then(Value::as_array) {
        let names: Vec<String> = list.iter().filter_map(|one| one.get("name")).map(words).collect();
        line("snapshots", names.join(", "));
    }
    if let Some(data) = report.pointer("/format-specific/data").and_then(Value::as_object) {
        line("Format specific information", String::new());
        for (name, value) in data {
            line(&format!("    {}", name.replace('-', " ")), words(value));
        }
    }
    text
}

/// Internal snapshots, as qemu-img's JSON has them.
pub fn snapshots(list: &[Snapshot]) -> Value {
    let rows = list.iter().map(|snapshot| {
        let clock = Duration::from_nanos(snapshot.vm_clock);
        let mut row = json!({
            "id": snapshot.id,
            "name": snapshot.name,
            "vm-state-size": snapshot.vm_state,
            "date-sec": snapshot.date.0,
            "date-nsec": snapshot.date.1,
            "vm-clock-sec": clock.as_secs(),
            "vm-clock-nsec": clock.subsec_nanos(),
        });
        if let (Some(count), Some(row)) = (snapshot.icount, row.as_object_mut()) {
            row.insert("icount".into(), json!(count));
        }
        row
    });
    rows.collect()
}

/// Internal snapshots for people.
pub fn snapshots_text(list: &[Snapshot]) -> String {
    let mut text =
        format!("{:<8} {:<24} {:>10} {:>20} {:>14}\n", "ID", "NAME", "VM SIZE", "DATE (UTC)", "VM CLOCK");
    for snapshot in list {
        let clock = Duration::from_nanos(snapshot.vm_clock);
        let _ = writeln!(
            text,
            "{:<8} {:<24} {:>10} {:>20} {:>13.3}s",
            shown(&snapshot.id),
            shown(&snapshot.name),
            Size(snapshot.vm_state).to_string(),
            date(snapshot.date.0.into()),
            clock.as_secs_f64()
        );
    }
    text
}

/// A moment in seconds since 1970 as a date (the civil calendar, by days since 0000-03-01).
pub fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400 + 719_468, seconds % 86400);
    let era_day = days % 146_097;
    let year_of_era = (era_day - era_day / 1460 + era_day / 36_524 - era_day / 146_096) / 365;
    let day = era_day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day + 2) / 153;
    let (dom, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = year_of_era + days / 146_097 * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{dom:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

/// `check`, as qemu-img's JSON has it.
pub fn check(image: &Image, found: &Findings) -> Value {
    let mut report = json!({
        "filename": image.path,
        "format": image.format.name(),
        "check-errors": found.errors,
        "image-end-offset": found.image_end_offset,
        "total-clusters": found.total_clusters,
        "allocated-clusters": found.allocated_clusters,
        "fragmented-clusters": found.fragmented_clusters,
        "compressed-clusters": found.compressed_clusters,
    });
    let numbers = [
        ("corruptions", found.corruptions),
        ("leaks", found.leaks),
        ("corruptions-fixed", found.corruptions_fixed),
        ("leaks-fixed", found.leaks_fixed),
    ];
    if let Some(report) = report.as_object_mut() {
        for (name, count) in numbers.into_iter().filter(|(_, count)| *count > 0) {
            report.insert(name.into(), json!(count));
        }
        if !found.messages.is_empty() {
            report.insert("messages".into(), json!(found.messages));
        }
    }
    report
}

/// `check` for people.
pub fn check_text(found: &Findings) -> String {
    let mut text = String::new();
    if found.corruptions_fixed > 0 || found.leaks_fixed > 0 {
        let _ = writeln!(
            text,
            "Repaired: {} errors, {} leaked clusters.",
            found.corruptions_fixed, found.leaks_fixed
        );
    }
    if found.is_clean() {
        text.push_str("No errors were found on the image.\n");
    }
    if found.corruptions > 0 {
        let _ = writeln!(text, "{} errors were found on the image.", found.corruptions);
        text.push_str("Data may be lost: repair with --repair; what cannot be read is then zeroes.\n");
    }
    if found.leaks > 0 {
        let _ =
            writeln!(text, "{} leaked clusters were found: they cost space and nothing else.", found.leaks);
    }
    let share = |part: u64| 100.0 * part as f64 / found.total_clusters.max(1) as f64;
    let of = |part: u64| 100.0 * part as f64 / found.allocated_clusters.max(1) as f64;
    let _ = writeln!(
        text,
        "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\nImage end offset: {}",
        found.allocated_clusters,
        found.total_clusters,
        share(found.allocated_clusters),
        of(found.fragmented_clusters),
        of(found.compressed_clusters),
        found.image_end_offset
    );
    text
}

/// What a part of a disk is made of: tells where each run begins, and what it is, as it is found. A hostile image of some
/// megabytes has more runs than there is memory for.
pub fn each_extent(
    image: &Image,
    from: u64,
    len: u64,
    mut with: impl FnMut(u64, &Status) -> Result<()>,
) -> Result<()> {
    let _watching = signals::watching();
    let end = from.saturating_add(len).min(image.disk.capacity());
    let mut at = from;
    let mut run: Option<(u64, Status)> = None;
    while at < end {
        if signals::cancelled() {
            return Err(with_code(signals::cancelled_code(), "cancelled"));
        }
        let status = image.disk.block_status(at, end - at);
        let status = status.with_context(|| format!("cannot read {}", image.path.display()))?;
        let step = status.len.max(1);
        match &mut run {
            Some((start, last)) if continues(*start, last, at, &status) => last.len += step,
            _ => {
                if let Some((start, done)) = run.replace((at, status)) {
                    with(start, &done)?;
                }
            }
        }
        at = at.saturating_add(step);
    }
    run.map_or(Ok(()), |(start, last)| with(start, &last))
}

/// `map`, as qemu-img's JSON has it.
pub fn map(image: &Image, out: impl io::Write) -> Result<()> {
    let mut writer = serde_json::Serializer::pretty(out);
    let mut list = writer.serialize_seq(None)?;
    each_extent(image, 0, u64::MAX, |start, status| {
        let data = status.content == Content::Data;
        let mut row = json!({
            "start": start,
            "length": status.len,
            "depth": status.depth,
            "present": status.present,
            "zero": !data,
            "data": data,
            "compressed": status.compressed,
        });
        if let (Some(offset), Some(row)) = (status.offset, row.as_object_mut()) {
            row.insert("offset".into(), json!(offset));
        }
        Ok(list.serialize_element(&row)?)
    })?;
    list.end()?;
    Ok(writeln!(writer.into_inner())?)
}

/// The image of a chain that has a part of the disk.
pub fn owner<'a>(image: &'a Image, status: &Status) -> &'a Image {
    let mut layers = std::iter::successors(Some(image), |image| image.backing.as_deref());
    layers.nth(status.depth as usize).unwrap_or(image)
}

fn continues(start: u64, last: &Status, at: u64, next: &Status) -> bool {
    let place = last.offset.map(|offset| offset.saturating_add(at - start));
    place == next.offset
        && (last.content, last.depth, last.present, last.compressed)
            == (next.content, next.depth, next.present, next.compressed)
}

/// `map` for people: the data, and the file that has it.
pub fn map_text(image: &Image, mut out: impl io::Write) -> Result<()> {
    writeln!(out, "{:<15} {:<15} {:<15} File", "Offset", "Length", "Mapped to")?;
    each_extent(image, 0, u64::MAX, |start, status| {
        if status.content != Content::Data {
            return Ok(());
        }
        let place = status.offset.map_or("compressed".to_owned(), |at| format!("{at:#x}"));
        let (start, len) = (format!("{start:#x}"), format!("{:#x}", status.len));
        let file = owner(image, status).path.display();
        Ok(writeln!(out, "{start:<15} {len:<15} {place:<15} {file}")?)
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn names_give_no_orders_to_a_terminal() {
        assert_eq!(shown("a\u{1b}[2Jb\nc\u{e4}"), "a\\u{1b}[2Jb\\nc\u{e4}");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_795_352_580), "2026-11-22 13:03:00");
    }
}
