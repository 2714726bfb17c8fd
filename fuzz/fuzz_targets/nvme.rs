//! A hostile driver of the NVMe controller: registers, rings, commands with anything in them, at any time.
#![no_main]

use chipset::pci::{Function, command};
use device::block::{Controller, Geometry, Operation, Outcome};
use device::{Line, MsiSink, Notify, VmTime};
use memory::GuestMemory;
use nvme::{Nvme, NvmeConfig};
use yado_fuzz::{Input, enable_msix, ram};

const NOW: VmTime = VmTime(0);
const RAM: u64 = 0x2_0000;
const CAPACITY: u64 = 1 << 20;
const BAR: u64 = 0x4000;
const DOORBELLS: u64 = 0x1000;

/// Where the rings of queue 0 and of the I/O queues are: a page each, submissions first.
const RINGS: u64 = 0x1000;
const ENTRIES: u64 = 16;

struct Driver {
    nvme: Nvme,
    memory: GuestMemory,
    tails: [u64; 4],
    heads: [u64; 4],
    id: u16,
}

impl Driver {
    fn write(&mut self, at: u64, size: u8, value: u64) {
        self.nvme.bar_write(0, at, size, value, NOW);
    }

    /// Puts a command into a ring and, if asked to, rings the doorbell.
    fn submit(&mut self, queue: usize, words: [u32; 16], ring: bool) {
        let base = RINGS + queue as u64 * 0x2000;
        let at = base + self.tails[queue] % ENTRIES * 64;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory.write(at, &bytes).expect("rings are RAM");
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES;
        if ring {
            self.write(DOORBELLS + queue as u64 * 8, 4, self.tails[queue]);
        }
    }

    fn command(&mut self, opcode: u8, namespace: u32, prp: [u64; 2], rest: [u32; 6]) -> [u32; 16] {
        self.id = self.id.wrapping_add(1);
        let mut words = [0; 16];
        words[0] = u32::from(opcode) | u32::from(self.id) << 16;
        words[1] = namespace;
        for (i, prp) in prp.iter().enumerate() {
            words[6 + i * 2] = *prp as u32;
            words[7 + i * 2] = (prp >> 32) as u32;
        }
        words[10..].copy_from_slice(&rest);
        words
    }

    /// As Linux does: the administrator's queues, then two pairs for I/O.
    fn bring_up(&mut self, pairs: u8) {
        self.write(0x24, 4, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        self.write(0x28, 8, RINGS);
        self.write(0x30, 8, RINGS + 0x1000);
        self.write(0x14, 4, 0x0046_0001);
        for pair in 1..=u32::from(pairs.min(3)) {
            let base = RINGS + u64::from(pair) * 0x2000;
            let size = (ENTRIES as u32 - 1) << 16;
            let completion =
                self.command(5, 0, [base + 0x1000, 0], [pair | size, 3 | pair << 16, 0, 0, 0, 0]);
            self.submit(0, completion, true);
            let submission = self.command(1, 0, [base, 0], [pair | size, 1 | pair << 16, 0, 0, 0, 0]);
            self.submit(0, submission, true);
        }
        self.heads[0] = u64::from(pairs.min(3)) * 2 % ENTRIES;
        self.write(DOORBELLS + 4, 4, self.heads[0]);
    }
}

/// An address that a data pointer may hold: mostly RAM, mostly a page.
fn pointer(input: &mut Input<'_>) -> u64 {
    let [kind, page] = input.array();
    match kind & 7 {
        0..=3 => u64::from(page) << 12 & (RAM - 1),
        4 | 5 => (u64::from(page) << 12 & (RAM - 1)) + u64::from(kind >> 3) * 8,
        6 => RAM - u64::from(page),
        _ => input.number(),
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let memory = ram(RAM);
    let setup = input.u8();
    let block_size = if setup & 8 == 0 { 512 } else { 4096 };
    let geometry =
        Geometry { capacity: CAPACITY, block_size, read_only: setup & 16 != 0, discard: setup & 32 == 0 };
    let disk = NvmeConfig { geometry, serial: "fuzz".into(), uuid: [7; 16] };
    let sink = MsiSink::unconnected();
    let mut nvme = Nvme::new(memory.clone(), sink, Notify::unconnected(), disk);
    nvme.config_mut().write(4, 2, u32::from(command::BUS_MASTER | command::MEMORY));
    nvme.config_written(4);
    // Else by wire, which ends nowhere.
    nvme.config_mut().connect_interrupt(0, 16, Line::unconnected());
    if setup & 64 != 0 {
        enable_msix(&mut nvme);
    }
    let mut driver = Driver { nvme, memory, tails: [0; 4], heads: [0; 4], id: 0 };
    if setup & 7 != 0 {
        driver.bring_up(setup & 3);
    }
    let mut taken: Vec<u64> = Vec::new();
    while !input.is_empty() {
        let action = input.u8();
        let queue = usize::from(action >> 4 & 3);
        match action & 15 {
            0 => {
                let (at, value) = (u64::from(input.u16()), input.number());
                driver.write(at % BAR, 1 << (action >> 4 & 3), value);
            }
            1 => {
                let at = u64::from(input.u16()) % BAR;
                driver.nvme.bar_read(0, at, 1 << (action >> 4 & 3), NOW);
            }
            2 => {
                let at = u64::from(input.u16()) << 1 & (RAM - 1);
                let bytes = input.array::<8>();
                let _ = driver.memory.write(at, &bytes);
            }
            // A list of pages, for transfers of more than two.
            3 => {
                let at = u64::from(input.u8()) << 12 & (RAM - 1);
                for entry in 0..u64::from(input.u8() & 31) {
                    let page = pointer(&mut input);
                    let _ = driver.memory.write(at + entry * 8, &page.to_le_bytes());
                }
            }
            4..=7 => {
                let opcodes = [0, 1, 2, 8, 9, 2, 1, 0x7f];
                let opcode = opcodes[usize::from(input.u8() & 7)];
                let prp = [pointer(&mut input), pointer(&mut input)];
                let [block, blocks, more] = input.array();
                let flags = u32::from(input.u16()) << 16;
                let rest = [block.into(), u32::from(more & 4), u32::from(blocks) | flags, 0, 0, 0];
                let namespace = if more & 3 == 3 { u32::MAX } else { u32::from(more & 3 != 2) };
                let words = driver.command(opcode, namespace, prp, rest);
                driver.submit(queue, words, true);
            }
            8 | 9 => {
                let opcodes = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 0x80];
                let opcode = opcodes[usize::from(input.u8()) % opcodes.len()];
                let prp = [pointer(&mut input), pointer(&mut input)];
                let rest = [input.number(), input.number(), input.number()].map(|value| value as u32);
                let words =
                    driver.command(opcode, (action >> 4).into(), prp, [rest[0], rest[1], rest[2], 0, 0, 0]);
                driver.submit(0, words, action & 1 == 0);
            }
            10 => {
                if let Some(request) = driver.nvme.next_request() {
                    let end = request.offset.checked_add(request.len);
                    assert!(end.is_some_and(|end| end <= CAPACITY), "a request beyond the disk: {request:?}");
                    let bytes: u64 = request.segments.iter().map(|segment| u64::from(segment.len)).sum();
                    let moves = matches!(request.operation, Operation::Read | Operation::Write { .. });
                    assert_eq!(bytes, if moves { request.len } else { 0 }, "{request:?}");
                    assert!(
                        !geometry.read_only
                            || matches!(request.operation, Operation::Read | Operation::Flush)
                    );
                    taken.push(request.token);
                    assert!(taken.len() < 100_000, "more and more requests");
                }
            }
            11 if !taken.is_empty() => {
                let token = taken.swap_remove(usize::from(input.u8()) % taken.len());
                let outcomes = [Outcome::Ok, Outcome::IoError, Outcome::BadAddress, Outcome::NoSpace];
                driver.nvme.complete(token, outcomes[queue]);
            }
            12 => {
                driver.heads[queue] = (driver.heads[queue] + u64::from(input.u8() & 3)) % ENTRIES;
                driver.write(DOORBELLS + 4 + queue as u64 * 8, 4, driver.heads[queue]);
            }
            13 => {
                let at = u64::from(input.u8()) % 20 * 4;
                driver.write(DOORBELLS + at, 4, u64::from(action >> 4));
            }
            14 => {
                let (at, value) = (u16::from(input.u8()) & 0xfc, input.u32());
                driver.nvme.config_mut().write(at, 4, value);
                driver.nvme.config_written(at);
            }
            15 if action >> 4 == 15 => {
                driver.nvme.reset();
                driver.tails = [0; 4];
            }
            _ => driver.write(
                0x14,
                4,
                u64::from(action >> 4 & 1) | u64::from(action >> 5 & 3) << 14 | 0x46_0000,
            ),
        }
    }
    driver.nvme.inspect();
});
