//! The check: every entry of the table must name a block that is in the file and that nothing else names, and the file must
//! end with its footer.
//!
//! A repair empties entries that name no block, gives those that share one a copy, and writes the footer again.

use super::header::{FOOTER, HEADER};
use super::{ENTRY, Layer, UNUSED, lock, table_bytes};
use crate::endian::{be32, size};
use crate::format::findings::{Findings, Repair};
use crate::format::mapped::{Places, Renames, SECTOR, copy_row};
use crate::storage::Storage;
use std::io;
use std::sync::atomic::Ordering;

/// Bytes of the table that are looked at together.
const PIECE: u64 = 1 << 20;

/// Calls `with` for each entry of a table that is used: its place in the file, and the sector that it names.
pub fn each_entry(
    storage: &dyn Storage,
    table: u64,
    entries: u64,
    mut with: impl FnMut(u64, u32) -> io::Result<()>,
) -> io::Result<()> {
    let bytes = entries.saturating_mul(ENTRY);
    let mut done = 0u64;
    while done < bytes {
        let mut piece = vec![0; size(bytes.saturating_sub(done).min(PIECE))];
        let mut at = table.saturating_add(done);
        storage.read_bytes(at, &mut piece)?;
        done = done.saturating_add(piece.len() as u64);
        for entry in piece.chunks_exact(ENTRY as usize).map(|entry| be32(entry, 0)) {
            if entry != UNUSED {
                with(at, entry)?;
            }
            at = at.saturating_add(ENTRY);
        }
    }
    Ok(())
}

/// Checks an image, in which nothing is dirty, and repairs it.
pub fn check(layer: &Layer, storage: &dyn Storage, repair: Repair) -> io::Result<Findings> {
    let mut found = look(layer, storage)?;
    if repair == Repair::Nothing {
        return Ok(found.findings);
    }
    if repair == Repair::All && found.findings.corruptions > 0 {
        mend(layer, storage, &mut found)?;
    }
    // A copy that was added has taken the footer's place.
    let footer = lock(&layer.header).footer;
    if found.findings.leaks > 0 {
        layer.tail.unseal();
    }
    layer.seal_with(storage, &footer)?;
    storage.flush()?;
    let last = look(layer, storage)?.findings;
    Ok(last.after_repair_of(&found.findings))
}

struct Found {
    findings: Findings,
    bad: Vec<u64>,
    places: Places,
}

fn look(layer: &Layer, storage: &dyn Storage) -> io::Result<Found> {
    let header = lock(&layer.header).clone();
    let mut found = Found { findings: Findings::default(), bad: Vec::new(), places: Places::default() };
    let Some(blocks) = &header.blocks else {
        found.findings.image_end_offset = header.capacity.saturating_add(FOOTER);
        return Ok(found);
    };
    let (len, row) = (storage.len(), layer.row());
    found.places.table(0, FOOTER);
    found.places.table(blocks.at, HEADER);
    found.places.table(blocks.table, table_bytes(blocks.entries));
    let (mut next, mut allocated, mut fragmented) = (0u64, 0u64, 0u64);
    each_entry(storage, blocks.table, blocks.entries, |at, sector| {
        let place = u64::from(sector).saturating_mul(SECTOR);
        if !layer.is_place(place, len) {
            found.bad.push(at);
            found.findings.corrupt(|| format!("the table entry at {at:#x} ({sector:#x}) names no block"));
            return Ok(());
        }
        found.places.block(place, row);
        allocated = allocated.saturating_add(1);
        // Blocks are aligned: a little room between them is none.
        if next != 0 && !(next..next.saturating_add(super::ALIGN)).contains(&place) {
            fragmented = fragmented.saturating_add(1);
        }
        next = place.saturating_add(row);
        Ok(())
    })?;
    let shared = found.places.conflicts().count();
    let findings = &mut found.findings;
    if shared > 0 {
        findings.corruptions = findings.corruptions.saturating_add(shared);
        findings.say(|| format!("{shared} table entries name blocks that something else uses"));
    }
    let mut last = [0; FOOTER as usize];
    storage.read_bytes(len.saturating_sub(FOOTER), &mut last)?;
    if last != header.footer {
        findings.leaks = 1;
        findings.say(|| "the file does not end with its footer: it was not closed in order".into());
    }
    findings.total_clusters = header.capacity.div_ceil(blocks.block());
    (findings.allocated_clusters, findings.fragmented_clusters) = (allocated, fragmented);
    findings.image_end_offset = layer.tail.end().saturating_add(FOOTER);
    Ok(found)
}

/// Empties entries that name no block, and gives copies to those that share one.
fn mend(layer: &Layer, storage: &dyn Storage, found: &mut Found) -> io::Result<()> {
    for at in &found.bad {
        storage.write_bytes(*at, &UNUSED.to_be_bytes())?;
    }
    storage.flush()?;
    let mut conflicts = found.places.conflicts();
    // What a file says about itself must not make it many times as large.
    let mut budget = storage.len();
    let mut renames = Renames::default();
    let (table, entries) = (layer.table.load(Ordering::Acquire), layer.entries.load(Ordering::Acquire));
    each_entry(storage, table, entries, |at, sector| {
        let place = u64::from(sector).saturating_mul(SECTOR);
        if conflicts.claim(place) || budget == 0 {
            return Ok(());
        }
        let copy = layer.tail.append(storage, layer.row(), layer.bitmap, super::ALIGN)?;
        let Ok(to) = u32::try_from(copy / SECTOR) else { return Ok(()) };
        budget = budget.saturating_sub(copy_row(storage, place, copy, layer.row())?.max(SECTOR));
        renames.push(storage, at, &to.to_be_bytes())
    })?;
    renames.write(storage)
}
