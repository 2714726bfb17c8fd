//! Entry points for fuzzers: a device, driven by bytes.
//!
//! The bytes become a list of actions of five bytes each: register and configuration accesses, writes to guest RAM where
//! the rings are, and calls from the outside. Most of the time the device was brought up properly first, so that bytes
//! reach the rings.

use crate::{Block, Console, Net, NetConfig, Rng};
use chipset::pci::{Function, MSIX_CAPABILITY, command};
use device::block::{Controller, Geometry, Outcome};
use device::serial::Endpoint;
use device::{MsiSink, Notify, VmTime};
use memory::{Backing, GuestMemory};
use net::{Batch, Offload};

const RAM: u64 = 1 << 18;
/// Rings of queue `i` are in the `i`-th of pages this size, and so close together that bytes hit them.
const RING_STEP: u64 = 0x400;
const QUEUE_SIZE: u16 = 8;
/// What a driver's descriptors are: two chains of a disk request's three parts, the first for a read, the second for a
/// write; a message; room for one. Length and flags (1: NEXT, 2: WRITE, 2.7.5).
const DESCRIPTORS: [(u32, u16); QUEUE_SIZE as usize] =
    [(16, 1), (512, 3), (1, 2), (16, 1), (512, 1), (1, 2), (64, 0), (64, 2)];
/// Each descriptor has a buffer of its own.
const BUFFER_STEP: u64 = 0x400;

/// Where the buffers of a queue are.
fn buffers(queue: u64) -> u64 {
    queue.wrapping_mul(BUFFER_STEP.wrapping_mul(QUEUE_SIZE.into())).wrapping_add(0x8000)
}
/// VIRTIO_F_RING_PACKED.
const PACKED: u64 = 1 << 34;
const NOW: VmTime = VmTime(0);

const MSIX_TABLE: u64 = 0x4000;
/// Places that are worth reading and writing: common configuration, ISR, device configuration, notifications, MSI-X.
const PLACES: [u64; 6] = [0, 0x1000, 0x2000, 0x3000, MSIX_TABLE, 0x6000];

/// Sets the device up as a driver does, agreeing to those of `features` that it offers.
fn bring_up(function: &mut dyn Function, memory: &GuestMemory, features: u64) {
    let mut offered = 0;
    for select in [1, 0] {
        function.bar_write(0, 0, 4, select, NOW);
        offered = offered << 32 | function.bar_read(0, 4, 4, NOW);
    }
    let features = features & offered;
    let mut write = |offset, size, value| function.bar_write(0, offset, size, value, NOW);
    write(20, 1, 3);
    for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
        write(8, 4, select);
        write(12, 4, half);
    }
    write(20, 1, 11);
    for queue in 0..8u16 {
        let base = u64::from(queue).wrapping_mul(RING_STEP);
        write(22, 2, queue.into());
        write(24, 2, QUEUE_SIZE.into());
        for (register, at) in [(32, 0), (40, 0x100), (48, 0x200)] {
            write(register, 8, base.wrapping_add(at));
        }
        write(28, 2, 1);
        for (index, (len, flags)) in (0u64..).zip(DESCRIPTORS) {
            let buffer = buffers(queue.into()).wrapping_add(index.wrapping_mul(BUFFER_STEP));
            let next = u128::from(index.wrapping_add(1));
            let tail = if features & PACKED == 0 {
                u128::from(flags) | next << 16
            } else {
                u128::from(index) | u128::from(flags) << 16
            };
            let raw = u128::from(buffer) | u128::from(len) << 64 | tail << 96;
            let at = base.wrapping_add(index.wrapping_mul(16));
            let _ = memory.write(at, &raw.to_le_bytes());
        }
    }
    write(20, 1, 15);
}

/// Switches MSI-X on, all vectors unmasked, and lets each queue have one.
fn interrupts(function: &mut dyn Function) {
    let mut at = function.config().read(0x34, 1) as u16;
    // Ids and links: no more capabilities than there is room for.
    for _ in 0..48 {
        if at == 0 || function.config().read(at, 1) == u32::from(MSIX_CAPABILITY) {
            break;
        }
        at = function.config().read(at.wrapping_add(1), 1) as u16;
    }
    function.config_mut().write(at.wrapping_add(2), 2, 0x8000);
    function.config_written(at);
    for vector in 0..8u64 {
        let entry = MSIX_TABLE.wrapping_add(vector.wrapping_mul(16));
        function.bar_write(0, entry, 8, 0xfee0_0000, NOW);
        function.bar_write(0, entry.wrapping_add(8), 8, vector, NOW);
        function.bar_write(0, 22, 2, vector, NOW);
        function.bar_write(0, 26, 2, vector, NOW);
    }
}

/// Zeroed RAM, mapped once: mapping takes longer than most cases do.
fn ram() -> Option<GuestMemory> {
    thread_local!(static MEMORY: Option<GuestMemory> = GuestMemory::new(&[(0, RAM)], Backing::Private).ok());
    let memory = MEMORY.with(Clone::clone)?;
    memory.fill(0, RAM, 0).ok()?;
    Some(memory)
}

/// Makes a chain available as a driver does: writes its head into the ring and moves the index on.
fn offer(memory: &GuestMemory, queue: u64, head: u16, notify_at: u64) {
    let available = queue.wrapping_mul(RING_STEP).wrapping_add(0x100);
    let index = memory.load_u16(available.wrapping_add(2)).unwrap_or(0);
    let slot = u64::from(index % QUEUE_SIZE).wrapping_mul(2).wrapping_add(4);
    let _ = memory.write(available.wrapping_add(slot), &(head % QUEUE_SIZE).to_le_bytes());
    let _ = memory.write(available.wrapping_add(2), &index.wrapping_add(1).to_le_bytes());
    // The driver's event index, where that is agreed on.
    let event = u64::from(QUEUE_SIZE).wrapping_mul(2).wrapping_add(4);
    let _ = memory.write(available.wrapping_add(event), &(notify_at as u16).to_le_bytes());
}

/// Makes the descriptor at a place of a packed ring available, in an even or an odd round, and says what is to be told.
fn offer_packed(memory: &GuestMemory, queue: u64, place: u8, round: u8) {
    let base = queue.wrapping_mul(RING_STEP);
    let at = base.wrapping_add(u64::from(place & 7).wrapping_mul(16)).wrapping_add(14);
    let kind = memory.load_u16(at).unwrap_or(0) & 7;
    let flags = kind | if round & 1 == 0 { 1 << 7 } else { 1 << 15 };
    let _ = memory.write(at, &flags.to_le_bytes());
    let _ = memory.write(base.wrapping_add(0x100), &[round >> 4, round & 0x80, round >> 1 & 3, 0]);
}

/// Plays `data` on a device; `outside` gets what is left for calls that do not come from the guest.
fn play<F: Function>(
    data: &[u8],
    make: impl FnOnce(GuestMemory) -> F,
    mut outside: impl FnMut(&mut F, u8, u16),
) {
    let Some(memory) = ram() else { return };
    let mut function = make(memory.clone());
    let Some((&first, rest)) = data.split_first() else { return };
    function.config_mut().write(4, 2, u32::from(command::BUS_MASTER | command::MEMORY));
    function.config_written(4);
    if first & 8 != 0 {
        interrupts(&mut function);
    }
    if first & 3 != 0 {
        let all = if first & 16 != 0 { u64::MAX } else { !PACKED };
        bring_up(&mut function, &memory, if first & 4 != 0 { all } else { 1 << 32 | 1 << 9 });
    }
    for action in rest.chunks_exact(5) {
        let &[kind, a, b, c, d] = action else { continue };
        let value = u32::from_le_bytes([a, b, c, d]);
        let size = 1u8 << (kind >> 6);
        let place = PLACES.get(usize::from(a >> 4)).copied().unwrap_or(0);
        let offset = place.wrapping_add(u64::from(a & 15 | (b & 3) << 4));
        match kind & 15 {
            0 | 1 => function.bar_write(0, offset, size, u64::from(c) | u64::from(d) << 8, NOW),
            2 => {
                function.bar_read(0, offset, size, NOW);
            }
            3..=6 => {
                // The rings, or what the descriptors point to at first: headers of requests, control messages.
                let region = if b & 8 != 0 { buffers(u64::from(b >> 4 & 7)) } else { 0 };
                let _ =
                    memory.write(region.wrapping_add(u64::from(a) << 2 | u64::from(b & 7) << 10), &[c, d]);
            }
            7 if first & 16 != 0 => offer_packed(&memory, u64::from(a & 7), b, c),
            7 => offer(&memory, u64::from(a & 7), u16::from(b), u64::from(c)),
            8..=10 => function.bar_write(0, 0x3000u64.wrapping_add(u64::from(a & 7) << 2), 2, 0, NOW),
            11 => {
                let offset = 0x40u16.wrapping_add(a.into()) & 0xfc;
                function.config_mut().write(offset, 4, u32::from(b) | u32::from(c) << 8 | u32::from(d) << 24);
                function.config_written(offset);
                function.config_reading(offset);
            }
            12 if function.deadline().is_some() => function.tick(NOW),
            _ => outside(&mut function, kind >> 4, value as u16),
        }
    }
    function.inspect();
    function.reset();
}

/// A console.
pub fn fuzz_console(data: &[u8]) {
    let make = |memory| {
        Console::new(memory, MsiSink::unconnected(), Notify::unconnected(), &["org.yado.agent.0", "second"])
    };
    play(data, make, |console, kind, value| {
        let port = u32::from(value & 3);
        let len = usize::from(value >> 2);
        match kind & 3 {
            0 => {
                let bytes = vec![0x55; len];
                assert!(console.offer(port, &bytes) <= len, "more was taken than offered");
            }
            1 | 2 => {
                let mut bytes = Vec::new();
                console.take(port, &mut bytes, len);
                assert!(bytes.len() <= len, "more was given than asked for");
            }
            _ if value & 4 != 0 => console.resize(value, value >> 8),
            _ => console.connect(port, value & 8 != 0),
        }
    });
}

/// A disk.
pub fn fuzz_block(data: &[u8]) {
    let geometry =
        Geometry { capacity: 1 << 16, block_size: 512, read_only: false, discard: true, write_cache: true };
    let make =
        |memory| Block::new(memory, MsiSink::unconnected(), Notify::unconnected(), geometry, "fuzz", 2);
    let mut tokens = Vec::new();
    play(data, make, move |block, kind, value| {
        if kind & 1 == 0 {
            if let Some(request) = block.next_request() {
                let end = request.offset.checked_add(request.len);
                assert!(end.is_some_and(|end| end <= geometry.capacity), "a request beyond the disk");
                let segments = request.segments.iter().map(|segment| u64::from(segment.len)).sum::<u64>();
                assert!(segments == request.len || request.segments.is_empty(), "segments and length differ");
                tokens.push(request.token);
            }
        } else if !tokens.is_empty() {
            let outcomes = [Outcome::Ok, Outcome::IoError, Outcome::Unsupported, Outcome::BadAddress];
            let outcome = outcomes.get(usize::from(kind >> 1 & 3)).copied().unwrap_or(Outcome::Ok);
            let token = tokens.swap_remove(usize::from(value).checked_rem(tokens.len()).unwrap_or(0));
            block.complete(token, outcome);
        }
    });
}

/// An entropy device.
pub fn fuzz_rng(data: &[u8]) {
    let make = |memory| Rng::new(memory, MsiSink::unconnected(), Box::new(|bytes| bytes.fill(0xaa)));
    play(data, make, |_, _, _| {});
}

/// A network card with two queue pairs.
pub fn fuzz_net(data: &[u8]) {
    let config = NetConfig { address: [2, 0, 0, 0, 0, 1], mtu: 1500, pairs: 2, withheld: 0 };
    let make = |memory| Net::new(memory, MsiSink::unconnected(), Notify::unconnected(), config);
    let mut batch = Batch::new(8, 0);
    let mut frame = [0x55; 2048];
    play(data, make, move |net, kind, value| match kind & 7 {
        0..=2 => {
            net.take(&mut batch);
            // What one guest sends, another gets.
            net.give(&mut batch);
            batch.clear();
        }
        3..=5 => {
            // A TCP segment over IPv4, as far as it has room, with an offload header of any content.
            wire(&mut frame, value);
            let len = usize::from(value).saturating_mul(4) & 0x7ff;
            let frame = frame.get(..len.max(14)).unwrap_or_default();
            let header = [kind >> 3 & 1, u8::from(value & 0x800 != 0), 0, 0, value as u8, 0, 34, 0, 16, 0];
            let offload = Offload::checked(header, frame).unwrap_or_default();
            batch.push(offload, &[frame]);
            net.give(&mut batch);
        }
        6 => net.set_link(value & 1 != 0),
        _ => net.announce(),
    });
}

/// Headers of a frame.
fn wire(frame: &mut [u8], value: u16) {
    let [port, _] = value.to_le_bytes();
    let headers = [0x08, 0, 0x45, 0, 2, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, port, 0, 2];
    frame.iter_mut().skip(12).zip(headers).for_each(|(to, from)| *to = from);
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::Rng;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn bytes_never_break_a_device(data in prop::collection::vec(any::<u8>(), 0..1500)) {
            fuzz_console(&data);
            fuzz_block(&data);
            fuzz_rng(&data);
            fuzz_net(&data);
        }

        /// What no writable descriptor and no used ring names stays as it was.
        #[test]
        fn a_device_writes_only_what_the_rings_name(
            descriptors in prop::collection::vec((0x8000u64..RAM, 0u32..200, 0u16..4, 0u16..QUEUE_SIZE), 8),
            heads in prop::collection::vec(0u16..QUEUE_SIZE, 8),
        ) {
            let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).unwrap();
            memory.fill(0x8000, RAM - 0x8000, 0x11).unwrap();
            let source = Box::new(|bytes: &mut [u8]| bytes.fill(0xaa));
            let mut rng = Rng::new(memory.clone(), MsiSink::unconnected(), source);
            rng.config_mut().write(4, 2, u32::from(command::BUS_MASTER));
            bring_up(&mut rng, &memory, 1 << 32);
            let mut named = vec![false; RAM as usize];
            for (i, &(address, len, flags, next)) in (0u64..).zip(&descriptors) {
                let raw = u128::from(address)
                    | u128::from(len) << 64
                    | u128::from(flags) << 96
                    | u128::from(next) << 112;
                memory.write(i * 16, &raw.to_le_bytes()).unwrap();
                if flags & 2 != 0 {
                    named[address as usize..].iter_mut().take(len as usize).for_each(|byte| *byte = true);
                }
            }
            for (i, head) in (0u64..).zip(&heads) {
                memory.write(0x104 + i * 2, &head.to_le_bytes()).unwrap();
            }
            memory.write(0x102, &8u16.to_le_bytes()).unwrap();
            let mut before = vec![0; RAM as usize];
            memory.read(0, &mut before).unwrap();
            rng.bar_write(0, 0x3000, 2, 0, NOW);
            let mut after = vec![0; RAM as usize];
            memory.read(0, &mut after).unwrap();
            let used_ring = 0x200..0x200 + 6 + 8 * usize::from(QUEUE_SIZE);
            for (at, (before, after)) in before.iter().zip(&after).enumerate() {
                prop_assert!(before == after || named[at] || used_ring.contains(&at), "byte {at:#x}");
            }
        }
    }

    /// The fuzzers are of use only if bytes reach what is behind the rings.
    #[test]
    fn bytes_reach_the_rings() {
        let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).unwrap();
        let source = Box::new(|bytes: &mut [u8]| bytes.fill(0xaa));
        let mut rng = Rng::new(memory.clone(), MsiSink::unconnected(), source);
        rng.config_mut().write(4, 2, u32::from(command::BUS_MASTER));
        bring_up(&mut rng, &memory, 1 << 32);
        offer(&memory, 0, 7, 0);
        rng.bar_write(0, 0x3000, 2, 0, NOW);
        assert_eq!(memory.read_array::<2>(0x202).unwrap(), [1, 0], "{}", rng.inspect());
        assert_eq!(memory.read_array::<64>(buffers(0) + 7 * BUFFER_STEP).unwrap(), [0xaa; 64]);
    }

    #[test]
    fn frames_go_through_a_card_that_bytes_drive() {
        let memory = ram().unwrap();
        let config = NetConfig { address: [2, 0, 0, 0, 0, 1], mtu: 1500, pairs: 2, withheld: 0 };
        let mut card = Net::new(memory.clone(), MsiSink::unconnected(), Notify::unconnected(), config);
        card.config_mut().write(4, 2, u32::from(command::BUS_MASTER | command::MEMORY));
        card.config_written(4);
        bring_up(&mut card, &memory, !PACKED);
        let mut batch = Batch::new(8, 0);
        offer(&memory, 1, 3, 0);
        card.take(&mut batch);
        assert_eq!(batch.first().unwrap().1.len(), 16 + 512 - 12);
        batch.clear();
        offer(&memory, 0, 7, 0);
        let mut frame = [0; 52];
        wire(&mut frame, 0);
        batch.push(Offload::default(), &[&frame]);
        card.give(&mut batch);
        assert_eq!(memory.read_array::<2>(0x202).unwrap(), [1, 0], "{}", card.inspect());
    }

    #[test]
    fn requests_are_served_and_interrupt() {
        use device::block::Operation;
        let memory = ram().unwrap();
        let sent = Arc::new(AtomicU32::new(0));
        let count = sent.clone();
        let sink = MsiSink::new(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let geometry = Geometry {
            capacity: 1 << 16,
            block_size: 512,
            read_only: false,
            discard: true,
            write_cache: true,
        };
        let mut block = Block::new(memory.clone(), sink, Notify::unconnected(), geometry, "fuzz", 2);
        block.config_mut().write(4, 2, u32::from(command::BUS_MASTER | command::MEMORY));
        block.config_written(4);
        for packed in [false, true] {
            memory.fill(0, RAM, 0).unwrap();
            bring_up(&mut block, &memory, if packed { u64::MAX } else { !PACKED });
            // A reset unbound the queue from its vector.
            interrupts(&mut block);
            sent.store(0, Ordering::SeqCst);
            memory.write(buffers(0) + 3 * BUFFER_STEP, &[1]).unwrap();
            for (head, operation) in [(0, Operation::Read), (3, Operation::Write { fua: false })] {
                if packed {
                    offer_packed(&memory, 0, head, 0);
                } else {
                    offer(&memory, 0, head.into(), u64::from(head / 3));
                }
                let request = block.next_request().unwrap();
                assert_eq!((request.operation, request.len), (operation, 512));
                block.complete(request.token, Outcome::Ok);
            }
            if packed {
                // Used descriptors where the chains began, with their ids, and both bits.
                let used = [0u64, 3].map(|place| memory.load_u32(place * 16 + 12).unwrap());
                assert_eq!(used, [0x8082_0002, 0x8082_0005]);
            } else {
                assert_eq!(memory.read_array::<2>(0x202).unwrap(), [2, 0]);
            }
            assert_eq!(sent.load(Ordering::SeqCst), 2, "packed: {packed}");
            block.bar_write(0, 20, 1, 0, NOW);
        }
    }
}
