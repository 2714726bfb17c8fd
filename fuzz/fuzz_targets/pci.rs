//! A guest that writes garbage to the configuration of every PCI function, moves BARs about, and uses what answers
//! where: MSI-X tables above all.
#![no_main]

use chipset::ioapic::{IoApic, PINS};
use chipset::pci::{Host, Window, command};
use device::block::{Controller, Geometry};
use device::{Access, Device, MsiSink, Notify, VmTime};
use nvme::{Nvme, NvmeConfig};
use std::sync::{Arc, Mutex};
use virtio::{Block, Console, Rng};
use yado_fuzz::{Input, enable_msix, ram};

const NOW: VmTime = VmTime(0);
const PORTS: Window = Window { base: 0xc000, len: 0x1000 };
const MMIO32: Window = Window { base: 0xc000_0000, len: 0x2000_0000 };
const MMIO64: Window = Window { base: 0x40_0000_0000, len: 0x40_0000_0000 };

fn bus() -> (Host, Arc<Mutex<Nvme>>) {
    let memory = ram(1 << 16);
    let (sink, notify) = (MsiSink::unconnected(), Notify::unconnected());
    let ioapic = IoApic::new(0, PINS, sink.clone());
    let host = Host::new([16u8, 17, 18, 19].map(|gsi| (gsi, ioapic.line(gsi.into()))), |_| {});
    let geometry = Geometry { capacity: 1 << 20, block_size: 512, read_only: false, discard: true };
    let disk = NvmeConfig { geometry, serial: "fuzz".into(), uuid: [7; 16] };
    let nvme = Arc::new(Mutex::new(Nvme::new(memory.clone(), sink.clone(), notify.clone(), disk)));
    host.attach(nvme.clone());
    host.attach(Arc::new(Mutex::new(Block::new(
        memory.clone(),
        sink.clone(),
        notify.clone(),
        geometry,
        "fuzz",
    ))));
    host.attach(Arc::new(Mutex::new(Console::new(memory.clone(), sink.clone(), notify, &["one", "two"]))));
    host.attach(Arc::new(Mutex::new(Rng::new(memory, sink, Box::new(|bytes| bytes.fill(0xaa))))));
    assert!(host.assign_resources(PORTS, MMIO32, MMIO64));
    (host, nvme)
}

/// An address in a BAR, if that has one.
fn target(host: &Host, input: &mut Input<'_>) -> u64 {
    let [slot, bar] = input.array();
    let offset = u64::from(input.u16());
    let functions = host.functions();
    let Some((_, function)) = functions.get(usize::from(slot) % functions.len()) else { return offset };
    let function = function.lock().expect("no panic before");
    function.config().bar_address(bar % 6).unwrap_or(MMIO32.base).wrapping_add(offset)
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (host, nvme) = bus();
    let mut device = host.clone();
    if input.u8() & 1 != 0 {
        for (_, function) in host.functions().iter().skip(1) {
            let mut function = function.lock().expect("no panic before");
            function.config_mut().write(4, 2, u32::from(command::MEMORY | command::BUS_MASTER));
            function.config_written(4);
            enable_msix(&mut *function);
        }
    }
    while !input.is_empty() {
        let action = input.u8();
        let size = 1u8 << (action >> 4 & 3);
        match action & 15 {
            // As the bus does: aligned or not, but inside the window.
            0..=3 => {
                let at =
                    u64::from(input.u16() & 0x7fff).min(Host::ECAM_LEN - 8) | u64::from(action >> 7) << 12;
                let access = Access { window: Host::ECAM, offset: at, size };
                if action & 3 == 0 {
                    device.read(access, NOW);
                } else {
                    device.write(access, input.number(), NOW);
                }
            }
            4 | 5 => {
                let select = 0x8000_0000 | u64::from(input.u16()) << 1;
                device.write(Access { window: Host::PORTS, offset: 0, size: 4 }, select, NOW);
                let access =
                    Access { window: Host::PORTS, offset: u64::from(action >> 6) + 4, size: size.min(4) };
                device.write(access, input.number(), NOW);
                device.read(access, NOW);
            }
            6..=11 => {
                let address = target(&host, &mut input);
                let last = host.mmio(address.wrapping_add(u64::from(size) - 1));
                let (Some(found), Some(last)) = (host.mmio(address), last) else { continue };
                if !Arc::ptr_eq(&found.function, &last.function) || found.bar != last.bar {
                    continue;
                }
                let mut function = found.function.lock().expect("no panic before");
                if action & 1 == 0 {
                    function.bar_read(found.bar, found.offset, size, NOW);
                } else {
                    function.bar_write(found.bar, found.offset, size, input.number(), NOW);
                }
            }
            12 => {
                let port = input.u16();
                if let Some(found) = host.port(port) {
                    let mut function = found.function.lock().expect("no panic before");
                    function.bar_write(found.bar, found.offset, 1, 0, NOW);
                }
            }
            13 => {
                nvme.lock().expect("no panic before").next_request();
            }
            14 if action >> 4 == 0 => device.reset(),
            _ => {
                device.write(Access { window: Host::PORTS, offset: (action >> 4).into(), size: 1 }, 6, NOW);
            }
        }
    }
    // Large, so only now and then.
    if data.len() & 15 == 0 {
        device.inspect();
    }
    for (_, function) in host.functions() {
        let function = function.lock().expect("no panic before");
        for bar in 0..6 {
            function.config().bar_address(bar);
        }
    }
});
