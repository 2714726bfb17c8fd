//! The check: every entry must name a cluster that is in the file, and that nothing else names.
//!
//! A repair empties entries that name no place at all, and gives those that share a cluster with another one a copy of it,
//! so that no later write shows in two places. Clusters that nothing names cost space: behind the last one that is used the
//! file is cut, between others they become holes.

use super::{ENTRY, Layer, ZERO, lock};
use crate::endian::le64;
use crate::format::findings::{Findings, Repair};
use crate::format::mapped::{Conflicts, Places, Renames, copy_row, each_piece};
use crate::storage::Storage;
use std::io;

/// Checks an image, in which nothing is dirty, and repairs it.
pub fn check(layer: &Layer, storage: &dyn Storage, repair: Repair) -> io::Result<Findings> {
    let mut walk = Walk::begin(layer, storage);
    walk.tables()?;
    let mut found = walk.finish();
    if repair == Repair::All && found.findings.corruptions > 0 {
        mend(layer, storage, &mut found)?;
    }
    // Behind a bad entry there may be a table that could still be saved, and its clusters look like gaps.
    let known = repair == Repair::All || found.findings.corruptions == 0;
    if repair != Repair::Nothing && known && found.gaps > 0 {
        free(layer, storage, &found)?;
    }
    let mut last = found.findings;
    if repair != Repair::Nothing {
        let mut again = Walk::begin(layer, storage);
        again.tables()?;
        last = again.finish().findings.after_repair_of(&last);
    }
    let needs_check = lock(&layer.header).needs_check();
    if repair == Repair::All && needs_check && last.corruptions == 0 && last.errors == 0 {
        storage.flush()?;
        layer.write_header(storage, super::Header::set_checked)?;
    }
    Ok(last)
}

/// An entry that names no place: where it is.
type Bad = u64;

struct Walk<'a> {
    layer: &'a Layer,
    storage: &'a dyn Storage,
    len: u64,
    places: Places,
    bad: Vec<Bad>,
    findings: Findings,
    next: u64,
}

struct Found {
    findings: Findings,
    bad: Vec<Bad>,
    conflicts: Conflicts,
    rows: Vec<(u64, u64)>,
    end: u64,
    gaps: u64,
}

impl<'a> Walk<'a> {
    fn begin(layer: &'a Layer, storage: &'a dyn Storage) -> Self {
        let header = &layer.fixed;
        let mut places = Places::default();
        places.table(0, header.header_bytes());
        places.table(header.l1, header.table_bytes());
        let clusters = super::Layout::capacity(layer).div_ceil(header.cluster());
        let findings = Findings { total_clusters: clusters, ..Findings::default() };
        Self { layer, storage, len: storage.len(), places, bad: Vec::new(), findings, next: 0 }
    }

    fn tables(&mut self) -> io::Result<()> {
        let (l1, bytes) = (self.layer.fixed.l1, self.layer.fixed.table_bytes());
        let mut tables = Vec::new();
        each_word(self.storage, l1, bytes, |at, word| {
            let sound = self.layer.is_table(word, self.len) && self.places.table(word, bytes);
            if sound {
                tables.push(word);
            } else {
                self.bad.push(at);
                self.findings
                    .corrupt(|| format!("the L1 entry at {at:#x} ({word:#x}) names no table of its own"));
            }
            Ok(())
        })?;
        let cluster = self.layer.fixed.cluster();
        for table in tables {
            each_word(self.storage, table, bytes, |at, word| {
                if word == ZERO {
                    return Ok(());
                }
                if !self.layer.is_cluster(word, self.len) {
                    self.bad.push(at);
                    self.findings.corrupt(|| format!("the L2 entry at {at:#x} ({word:#x}) names no cluster"));
                    return Ok(());
                }
                self.places.block(word, cluster);
                let findings = &mut self.findings;
                findings.allocated_clusters = findings.allocated_clusters.saturating_add(1);
                if self.next != 0 && self.next != word {
                    findings.fragmented_clusters = findings.fragmented_clusters.saturating_add(1);
                }
                self.next = word.saturating_add(cluster);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn finish(mut self) -> Found {
        let cluster = self.layer.fixed.cluster();
        let conflicts = self.places.conflicts();
        let shared = conflicts.count();
        if shared > 0 {
            self.findings.corruptions = self.findings.corruptions.saturating_add(shared);
            self.findings.say(|| format!("{shared} L2 entries name clusters that something else uses"));
        }
        let end = self.len.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        let rows = self.places.gaps(end);
        let gaps: u64 =
            rows.iter().map(|(from, to)| to.saturating_sub(*from) >> (cluster.trailing_zeros() & 63)).sum();
        self.findings.leaks = gaps;
        let used = self.places.end();
        self.findings.image_end_offset = used;
        Found { findings: self.findings, bad: self.bad, conflicts, rows, end: used, gaps }
    }
}

/// Calls `with` for each word of a table that is not zero: its place in the file, and the word.
fn each_word(
    storage: &dyn Storage,
    table: u64,
    bytes: u64,
    mut with: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    each_piece(storage, table, bytes, |skip, piece| {
        let mut at = table.saturating_add(skip);
        for word in piece.chunks_exact(ENTRY as usize).map(|word| le64(word, 0)) {
            if word != 0 {
                with(at, word)?;
            }
            at = at.saturating_add(ENTRY);
        }
        Ok(())
    })
}

/// Empties what names no place, and gives copies to those that share one.
fn mend(layer: &Layer, storage: &dyn Storage, found: &mut Found) -> io::Result<()> {
    for at in &found.bad {
        storage.write_bytes(*at, &[0; ENTRY as usize])?;
    }
    if found.conflicts.count() == 0 {
        return storage.flush();
    }
    let (l1, bytes) = (layer.fixed.l1, layer.fixed.table_bytes());
    let (cluster, len) = (layer.fixed.cluster(), storage.len());
    let mut tables = Vec::new();
    each_word(storage, l1, bytes, |_, word| {
        tables.push(word);
        Ok(())
    })?;
    // What a file says about itself must not make it many times as large.
    let mut budget = len;
    let mut renames = Renames::default();
    for table in tables {
        each_word(storage, table, bytes, |at, word| {
            if word == ZERO || found.conflicts.claim(word) || budget == 0 {
                return Ok(());
            }
            let copy = layer.tail.append(storage, cluster, 0, cluster)?;
            budget = budget.saturating_sub(copy_row(storage, word, copy, cluster)?.max(512));
            renames.push(storage, at, &copy.to_le_bytes())
        })?;
    }
    renames.write(storage)?;
    found.end = layer.tail.end();
    storage.flush()
}

/// Gives the space of clusters that nothing names back.
fn free(layer: &Layer, storage: &dyn Storage, found: &Found) -> io::Result<()> {
    for (from, to) in &found.rows {
        // Space that cannot be given back is lost, and nothing else.
        let _ = storage.punch_hole(*from, to.saturating_sub(*from));
    }
    if storage.len() > found.end {
        storage.flush()?;
        layer.tail.reset(found.end);
        storage.set_len(found.end)?;
    }
    storage.flush()
}
