use super::*;
use crate::offload::{HEADER_LEN, Lie};
use crate::wire::ether;
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A frame with right headers but for the transport checksum, which is the pseudo header's sum.
fn frame(v6: bool, udp: bool, tags: usize, payload: &[u8]) -> (Vec<u8>, usize) {
    let mut frame = vec![2; 12];
    for _ in 0..tags {
        frame.extend(ether::VLAN.to_be_bytes());
        frame.extend([0, 7]);
    }
    frame.extend(if v6 { ether::IPV6 } else { ether::IPV4 }.to_be_bytes());
    let transport = if udp { 8 } else { 20 };
    let len = payload.len() + transport;
    let kind = if udp { protocol::UDP } else { protocol::TCP };
    let (from, to) = if v6 {
        frame.extend([0x60, 0, 0, 0]);
        frame.extend((len as u16).to_be_bytes());
        frame.extend([kind, 64]);
        let (from, to) = (Ipv6Addr::from(5u128 << 96 | 1), Ipv6Addr::from(5u128 << 96 | 2));
        frame.extend(from.octets());
        frame.extend(to.octets());
        (IpAddr::V6(from), IpAddr::V6(to))
    } else {
        let mut header = vec![0x45, 0];
        header.extend((len as u16 + 20).to_be_bytes());
        header.extend([0xff, 0xff, 0x40, 0, 64, kind, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let sum = Sum::default().add(&header).checksum();
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend(header);
        (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)))
    };
    let start = frame.len();
    let pseudo = Sum::default().pseudo(from, to, kind, len).folded().to_be_bytes();
    frame.extend([0, 1, 0, 2]);
    if udp {
        frame.extend((len as u16).to_be_bytes());
        frame.extend(pseudo);
    } else {
        frame.extend(0xffff_ff00u32.to_be_bytes());
        frame.extend([0, 0, 0, 1, 0x50, 0x99, 1, 0]);
        frame.extend(pseudo);
        frame.extend([0, 0]);
    }
    frame.extend(payload);
    (frame, start)
}

fn header(gso: u8, size: u16, start: usize, offset: u16) -> [u8; HEADER_LEN] {
    let mut header = [1, gso, 0, 0, 0, 0, 0, 0, 0, 0];
    header[4..6].copy_from_slice(&size.to_le_bytes());
    header[6..8].copy_from_slice(&(start as u16).to_le_bytes());
    header[8..].copy_from_slice(&offset.to_le_bytes());
    header
}

/// Whether all checksums of a frame are right.
fn sound(frame: &[u8]) -> bool {
    let layers = layers::parse(frame, true).unwrap();
    let body = &frame[layers.transport..layers.end];
    let sum = Sum::default().pseudo(layers.source, layers.destination, layers.protocol, body.len()).add(body);
    let v4 = Sum::default().add(&frame[layers.network..layers.transport]).checksum() == 0;
    sum.checksum() == 0 && (v4 || layers.source.is_ipv6())
}

proptest! {
    #[test]
    fn the_pieces_are_sound_and_make_the_whole(
        payload in prop::collection::vec(any::<u8>(), 2..9000),
        size in 9u16..3000, v6: bool, udp: bool, tags in 0usize..3,
    ) {
        let (frame, start) = frame(v6, udp, tags, &payload);
        let gso = match (udp, v6) { (true, _) => 5, (_, true) => 4, _ => 0x81 };
        let offload = Offload::checked(header(gso, size, start, if udp { 6 } else { 16 }), &frame).unwrap();
        let Some(segments) = offload.segments else {
            prop_assert!(payload.len() <= usize::from(size));
            return Ok(());
        };
        prop_assert_eq!(Offload::checked(offload.encode(), &frame), Ok(offload));
        let (mut whole, mut count) = (vec![], 0u32);
        let mut failed = None;
        cut(&frame, segments, &mut vec![], &mut |offload, piece| {
            let Checksum::Partial { start, offset } = offload.checksum else { panic!() };
            complete_checksum(piece, start, offset);
            let layers = layers::parse(piece, true).unwrap();
            if !sound(piece) || layers.end != piece.len() {
                failed = Some(piece.to_vec());
            }
            let head = layers.transport + layers.transport_header(piece).unwrap();
            if !udp {
                let sequence = be32(piece, layers.transport + 4).unwrap();
                let last = whole.len() + piece.len() - head == payload.len();
                assert_eq!(sequence, 0xffff_ff00u32.wrapping_add(whole.len() as u32));
                assert_eq!(piece[layers.transport + 13] & FIN_PSH != 0, last);
                assert_eq!(piece[layers.transport + 13] & CWR != 0, count == 0 || v6);
            }
            whole.extend_from_slice(&piece[head..]);
            count += 1;
        });
        prop_assert_eq!(failed, None);
        prop_assert_eq!(whole, payload);
    }

    #[test]
    fn no_header_harms(header: [u8; HEADER_LEN], frame in prop::collection::vec(any::<u8>(), 0..100)) {
        if let Ok(Offload { segments: Some(segments), .. }) = Offload::checked(header, &frame) {
            cut(&frame, segments, &mut vec![], &mut |_, _| ());
        }
    }
}

#[test]
fn lies_are_told_apart() {
    let (frame, start) = frame(false, false, 0, &[1; 3000]);
    let check = |header| Offload::checked(header, &frame);
    assert!(check(header(1, 1000, start, 16)).unwrap().segments.is_some());
    assert_eq!(check(header(1, 4000, start, 16)).unwrap().segments, None, "one segment is none");
    assert_eq!(check(header(4, 1000, start, 16)), Err(Lie::Mismatch));
    assert_eq!(check(header(5, 1000, start, 6)), Err(Lie::Mismatch));
    assert_eq!(check(header(3, 1000, start, 16)), Err(Lie::Kind));
    assert_eq!(check(header(1, 0, start, 16)), Err(Lie::Size));
    assert_eq!(check(header(1, 2, start, 16)), Err(Lie::Size));
    assert_eq!(check(header(1, 1000, start + 2, 16)), Err(Lie::Checksum));
    assert_eq!(check(header(0, 0, 65535, 65535)), Err(Lie::Checksum));
    assert_eq!(check(header(0, 0, frame.len(), 0)), Err(Lie::Checksum));
    assert_eq!(check(header(0, 0, 2, 0)), Err(Lie::Checksum), "addresses have no checksum");
}
