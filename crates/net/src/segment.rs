//! What a receiver would not do itself, done for it: checksums completed, large frames cut.

use crate::offload::{Checksum, Offload, SegmentKind, Segments};
use crate::wire::checksum::Sum;
use crate::wire::layers;
use crate::wire::{be16, be32, protocol, put};

/// Flags of TCP that only the last, or only the first, of a run of segments carries.
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// Completes a checksum in place.
pub fn complete_checksum(frame: &mut [u8], start: u16, offset: u16) {
    let Some(covered) = frame.get(usize::from(start)..) else { return };
    // The field holds the pseudo header's sum and is covered itself.
    let sum = Sum::default().add(covered).checksum();
    // A UDP checksum of 0 would mean that there is none (RFC 768).
    let sum = if sum == 0 { 0xffff } else { sum };
    put(frame, usize::from(start).saturating_add(offset.into()), &sum.to_be_bytes());
}

/// Cuts a frame whose offload was [checked](Offload::checked) into frames with headers of their own, and gives each to
/// `emit`. Their checksums are still to be completed. `scratch` is overwritten.
pub fn cut(
    frame: &[u8],
    segments: Segments,
    scratch: &mut Vec<u8>,
    emit: &mut dyn FnMut(Offload, &mut [u8]),
) {
    cut_from(frame, segments, 0, scratch, &mut |offload, piece| {
        emit(offload, piece);
        true
    });
}

/// [`cut`] from the piece `first` on (the first has number 0), until `emit` answers `false`.
pub fn cut_from(
    frame: &[u8],
    segments: Segments,
    first: usize,
    scratch: &mut Vec<u8>,
    emit: &mut dyn FnMut(Offload, &mut [u8]) -> bool,
) {
    let Some(layers) = layers::parse(frame, false) else { return };
    let headers = usize::from(segments.headers);
    let (Some(head), Some(payload)) = (frame.get(..headers), frame.get(headers..layers.end)) else { return };
    let size = usize::from(segments.size).max(1);
    let count = payload.len().div_ceil(size);
    let v4 = layers.source.is_ipv4();
    let udp = matches!(segments.kind, SegmentKind::Udp4 | SegmentKind::Udp6);
    let id = be16(frame, layers.network.saturating_add(4)).unwrap_or(0);
    let sequence = be32(frame, layers.transport.saturating_add(4)).unwrap_or(0);
    for (number, part) in payload.chunks(size).enumerate().skip(first) {
        scratch.clear();
        scratch.extend_from_slice(head);
        scratch.extend_from_slice(part);
        let transport_len = scratch.len().saturating_sub(layers.transport);
        let ip_len = scratch.len().saturating_sub(layers.network);
        let word = |value: usize| u16::try_from(value).unwrap_or(u16::MAX).to_be_bytes();
        if v4 {
            put(scratch, layers.network.saturating_add(2), &word(ip_len));
            let id = id.wrapping_add(number as u16);
            put(scratch, layers.network.saturating_add(4), &id.to_be_bytes());
            put(scratch, layers.network.saturating_add(10), &[0, 0]);
            let header = scratch.get(layers.network..layers.transport).unwrap_or_default();
            let sum = Sum::default().add(header).checksum();
            put(scratch, layers.network.saturating_add(10), &sum.to_be_bytes());
        } else {
            put(scratch, layers.network.saturating_add(4), &word(ip_len.saturating_sub(40)));
        }
        let field = if udp {
            put(scratch, layers.transport.saturating_add(4), &word(transport_len));
            6
        } else {
            let done = (number.saturating_mul(size)) as u32;
            put(scratch, layers.transport.saturating_add(4), &sequence.wrapping_add(done).to_be_bytes());
            let last = number.saturating_add(1) == count;
            if let Some(flags) = scratch.get_mut(layers.transport.saturating_add(13)) {
                if !last {
                    *flags &= !FIN_PSH;
                }
                if number > 0 && segments.ecn {
                    *flags &= !CWR;
                }
            }
            16
        };
        let kind = if udp { protocol::UDP } else { protocol::TCP };
        let pseudo = Sum::default().pseudo(layers.source, layers.destination, kind, transport_len).folded();
        put(scratch, layers.transport.saturating_add(field), &pseudo.to_be_bytes());
        let start = u16::try_from(layers.transport).unwrap_or(u16::MAX);
        let checksum = Checksum::Partial { start, offset: field as u16 };
        if !emit(Offload { checksum, segments: None }, scratch) {
            return;
        }
    }
}

#[cfg(test)]
mod test;
