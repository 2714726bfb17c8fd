//! What happens to a machine between its guest's reset and the next instruction of its first vCPU.
//!
//! As on hardware: every device is as after power-up, RAM keeps what it holds (but where the kernel is loaded), the
//! real-time clock and VM time run on. Then what firmware did at the first start is done again: addresses for PCI
//! functions, ACPI tables, kernel and initrd. What the guest wrote to its disks stays, disposable or not.
//!
//! Called by one vCPU's thread while all others wait. Lock order: all disks' traffic, then one device at a time.

use crate::kernel::Kernel;
use crate::machine::Error;
use crate::storage::Traffic;
use crate::vcpu::Common;
use chipset::acpi::Tables;
use cpu::Registers;
use memory::GuestMemory;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// All that a restart needs beside what vCPUs share.
pub(crate) struct Restart {
    kernel: Kernel,
    tables: Tables,
    traffic: Vec<Traffic>,
    /// Network cards whose buffers other processes have.
    lent: Vec<Arc<Mutex<virtio::Net>>>,
    /// With which registers the first vCPU starts.
    start: Mutex<Registers>,
}

impl Restart {
    /// Loads the kernel for the first time.
    pub(crate) fn new(
        kernel: Kernel,
        tables: Tables,
        traffic: Vec<Traffic>,
        lent: Vec<Arc<Mutex<virtio::Net>>>,
        memory: &GuestMemory,
    ) -> Result<Self, Error> {
        let start = load(&kernel, &tables, memory)?;
        Ok(Self { kernel, tables, traffic, lent, start: Mutex::new(start) })
    }

    /// Waits until no other process writes into guest RAM: not for ever, since who does not answer is cut off.
    fn wait_for_buffers(&self) {
        let lent = |card: &Arc<Mutex<virtio::Net>>| {
            card.lock().unwrap_or_else(PoisonError::into_inner).lending().recall
        };
        while self.lent.iter().any(lent) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The registers with which the first vCPU starts.
    pub(crate) fn registers(&self) -> Registers {
        self.start.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Resets the machine and loads its kernel again. All vCPUs stand still and reset themselves afterwards.
    pub(crate) fn perform(&self, common: &Common) -> Result<(), Error> {
        // Disks finish what they are at, and then touch no RAM until their drivers have set them up again.
        let held: Vec<_> = self.traffic.iter().map(Traffic::hold).collect();
        common.buses.reset();
        self.wait_for_buffers();
        for index in 0..common.apics.len() {
            if let Some(apic) = common.apics.get(index) {
                apic.lock().unwrap_or_else(PoisonError::into_inner).reset();
            }
            common.timers.set(index, None);
        }
        common.system_clock.forget();
        let registers = load(&self.kernel, &self.tables, &common.memory)?;
        *self.start.lock().unwrap_or_else(PoisonError::into_inner) = registers;
        drop(held);
        Ok(())
    }
}

fn load(kernel: &Kernel, tables: &Tables, memory: &GuestMemory) -> Result<Registers, Error> {
    memory.write(tables.base, &tables.bytes).map_err(|error| Error::Devices(error.to_string()))?;
    kernel.load(memory, tables.base)
}
