//! The PCI functions that a configuration asks for, and the threads that serve them.

use crate::config::{DiskConfig, DiskInterface};
use crate::notice::{Notice, Notices};
use crate::port::{Port, Wake};
use crate::standstill::Standstill;
use crate::storage::{Errors, Traffic, Trouble, Worker};
use chipset::pci::{Host, SharedFunction};
use device::MsiSink;
use device::block::{Controller, Geometry};
use image::format::Raw;
use image::{Disk, Image, OpenOptions, Overlay};
use memory::GuestMemory;
use nvme::{Nvme, NvmeConfig};
use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use virtio::{Block, CONSOLE_PORT, Console, Rng};

/// Logical block size of disks, in bytes.
const BLOCK_SIZE: u32 = 512;

/// Threads of a disk: how many of its requests a slow image sees at a time.
const DISK_THREADS: usize = 8;

/// Why a disk cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// The file for disposable writes cannot be made.
    #[error("cannot keep the disk's disposable writes in {}: {source}", directory.display())]
    Overlay {
        /// Where it should be.
        directory: std::path::PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Not even one block.
    #[error("the disk image {} is empty; create one with a size first", path.display())]
    Empty {
        /// The image.
        path: std::path::PathBuf,
    },
    /// No slot is left.
    #[error("the PCI bus is full: use fewer disks")]
    BusFull,
    /// The guest's network cannot be made.
    #[error(transparent)]
    Network(#[from] net::gateway::Error),
    /// The tap cannot be used.
    #[error(transparent)]
    Tap(#[from] net::tap::Error),
    /// Another process cannot carry frames.
    #[error(transparent)]
    BackEnd(#[from] crate::lending::Error),
    /// The host has no event counter left.
    #[error("cannot serve a network card: {0}")]
    Card(io::Error),
    /// The same.
    #[error("cannot hear a device's doorbell: {0}")]
    Bell(io::Error),
}

/// Starts threads.
pub(crate) type Start = Box<dyn FnOnce() -> io::Result<Vec<JoinHandle<()>>> + Send>;

/// Threads that serve functions; each ends when its wake is closed. They start with the machine: until then its process has
/// one thread, and can give up what the machine does not need.
#[derive(Default)]
pub(crate) struct Workers {
    pub(crate) wakes: Vec<Wake>,
    /// What starts those that have not been started.
    pub(crate) starts: Vec<Start>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    /// One for each disk.
    pub(crate) traffic: Vec<Traffic>,
    /// One for each network card.
    pub(crate) bells: Vec<net::Bell>,
    /// Cards whose buffers other processes have.
    pub(crate) lent: Vec<Arc<Mutex<virtio::Net>>>,
    /// What there is to see of networks.
    pub(crate) monitors: Vec<Arc<net::gateway::Monitor>>,
    /// The cards whose frames this process carries: name, by what, the card.
    pub(crate) cards: Vec<(String, &'static str, Arc<Mutex<virtio::Net>>)>,
    /// Their frames.
    pub(crate) watch: Arc<net::watch::Watch>,
}

impl Workers {
    /// Starts all threads.
    pub(crate) fn start(&mut self) -> io::Result<()> {
        for start in self.starts.drain(..) {
            self.threads.extend(start()?);
        }
        Ok(())
    }

    /// Ends all threads, flushing images, and waits for them.
    pub(crate) fn end(&mut self) {
        self.wakes.iter().for_each(Wake::close);
        self.bells.iter().for_each(net::Bell::close);
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to flush.
            let _ = thread.join();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end();
    }
}

/// What functions are attached to.
pub(crate) struct Slots<'a> {
    pub(crate) pci: &'a Host,
    pub(crate) msi: &'a MsiSink,
    pub(crate) memory: &'a GuestMemory,
    pub(crate) notices: &'a Notices,
    pub(crate) standstill: &'a Standstill,
    /// The engine's, if it has any.
    pub(crate) doorbells: Option<Arc<dyn cpu::Doorbells>>,
}

impl Slots<'_> {
    /// What hangs doorbells that ring `event`, if the engine has any.
    pub(crate) fn bell(&self, event: BorrowedFd<'_>) -> io::Result<Option<virtio::Bell>> {
        let Some(doorbells) = self.doorbells.clone() else { return Ok(None) };
        let event = event.try_clone_to_owned()?;
        let mut hanging = BTreeSet::new();
        Ok(Some(Box::new(move |address, wanted| {
            // What the engine does not hang is heard as any other write is.
            if wanted && doorbells.hang(address, event.as_fd()) {
                hanging.insert(address);
            } else if !wanted && hanging.remove(&address) {
                doorbells.take_down(address, event.as_fd());
            }
        })))
    }

    /// One for the workers of a device, who hear the engine's doorbells if there are any.
    fn wake(&self) -> io::Result<Wake> {
        if self.doorbells.is_some() { Wake::with_ear() } else { Ok(Wake::default()) }
    }

    pub(crate) fn attach(&self, function: SharedFunction) -> Result<(), Error> {
        self.pci.attach(function).map(|_| ()).ok_or(Error::BusFull)
    }

    /// Attaches all disks in order.
    pub(crate) fn disks(&self, disks: &[DiskConfig], cpus: u32, workers: &mut Workers) -> Result<(), Error> {
        for (number, config) in disks.iter().enumerate() {
            let disk = open(config)?;
            let capacity = disk.capacity() & !u64::from(BLOCK_SIZE.wrapping_sub(1));
            if capacity == 0 {
                return Err(Error::Empty { path: config.path.clone() });
            }
            let geometry = Geometry {
                capacity,
                block_size: BLOCK_SIZE,
                read_only: disk.read_only(),
                discard: !disk.read_only(),
                write_cache: !config.cache.is_write_through(),
            };
            let wake = self.wake().map_err(Error::Bell)?;
            let controller = self.controller(number, config, geometry, cpus, &wake)?;
            let name = format!("disk{number}");
            let traffic = Traffic::default();
            workers.traffic.push(traffic.clone());
            let notices = self.notices.clone();
            let path = config.overlay.clone().unwrap_or_else(|| config.path.clone());
            let tell = move |trouble| notices.tell(notice(trouble, path.clone()));
            let errors = Errors {
                write: config.write_error,
                read: config.read_error,
                disk: number,
                standstill: self.standstill.clone(),
                tell: Box::new(tell),
            };
            let worker = Worker { controller, disk, memory: self.memory.clone(), traffic, errors };
            workers.wakes.push(wake.clone());
            workers.starts.push(Box::new(move || worker.serve(&name, &wake, DISK_THREADS)));
        }
        Ok(())
    }

    /// Attaches a virtio console whose ports have these names, after the console itself; answers the console and
    /// the ports in order.
    pub(crate) fn console(&self, names: &[String], wake: &Wake) -> Result<Vec<Port>, Error> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let console = Console::new(self.memory.clone(), self.msi.clone(), wake.notify(), &names);
        let console = Arc::new(Mutex::new(console));
        self.attach(console.clone())?;
        let first = CONSOLE_PORT.saturating_add(1);
        let named = (first..).zip(&names).map(|(number, _)| number);
        let port = |number| Port::new(console.clone(), number, wake.clone());
        Ok(std::iter::once(CONSOLE_PORT).chain(named).map(port).collect())
    }

    /// Attaches a source of entropy.
    pub(crate) fn entropy(&self) -> Result<(), Error> {
        let source = Box::new(|bytes: &mut [u8]| fill_random(bytes));
        self.attach(Arc::new(Mutex::new(Rng::new(self.memory.clone(), self.msi.clone(), source))))
    }

    fn controller(
        &self,
        number: usize,
        config: &DiskConfig,
        geometry: Geometry,
        cpus: u32,
        wake: &Wake,
    ) -> Result<Arc<Mutex<dyn Controller>>, Error> {
        let serial = format!("yado{number}");
        match config.interface {
            DiskInterface::Nvme => {
                let disk = NvmeConfig { geometry, serial, uuid: uuid(config) };
                let nvme = Nvme::new(self.memory.clone(), self.msi.clone(), wake.notify_one(), disk);
                let nvme = Arc::new(Mutex::new(nvme));
                self.attach(nvme.clone())?;
                Ok(nvme)
            }
            DiskInterface::Virtio => {
                let (memory, sink) = (self.memory.clone(), self.msi.clone());
                // A queue for each vCPU, so that none waits for another's lock in the guest.
                let queues = u16::try_from(cpus).unwrap_or(u16::MAX);
                let mut block = Block::new(memory, sink, wake.notify_one(), geometry, &serial, queues);
                if let Some(ear) = wake.ear()
                    && let Some(bell) = self.bell(ear).map_err(Error::Bell)?
                {
                    block.set_bell(bell);
                }
                let block = Arc::new(Mutex::new(block));
                self.attach(block.clone())?;
                Ok(block)
            }
        }
    }
}

/// The host's random bytes. The kernel gives them without fail once it has booted.
pub(crate) fn fill_random(mut bytes: &mut [u8]) {
    while !bytes.is_empty() {
        match rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty()) {
            Ok(done) => bytes = bytes.get_mut(done..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// What a disk has to say, as whoever runs the machine hears it.
fn notice(trouble: Trouble, path: PathBuf) -> Notice {
    match trouble {
        Trouble::Full => Notice::DiskFull { path, waits: false },
        Trouble::WaitsForSpace => Notice::DiskFull { path, waits: true },
        Trouble::Fails => Notice::DiskFails { path },
        Trouble::Over => Notice::DiskGoesOn { path },
    }
}

fn open(config: &DiskConfig) -> Result<Box<dyn Disk>, Error> {
    Ok(match &config.overlay {
        None => {
            let format = Some(config.format);
            let how = OpenOptions {
                format,
                read_only: config.read_only,
                // Whether a write is stable when it is done is the guest's to decide, and each request says it.
                cache: config.cache.written_back(),
                ..OpenOptions::default()
            };
            Box::new(config.detect_zeroes.on(Image::open(&config.path, how)?.disk))
        }
        Some(directory) => {
            let raw = Raw::open(&config.path, true)?;
            let overlay = Overlay::new(raw, directory);
            Box::new(overlay.map_err(|source| Error::Overlay { directory: directory.clone(), source })?)
        }
    })
}

/// The same image is the same disk in every run (version 8 of RFC 9562: vendor-specific).
fn uuid(config: &DiskConfig) -> [u8; 16] {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, &config.path).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    let bits = half(0) << 64 | half(1);
    let version_and_variant = 0xf000_u128 << 64 | 0b11 << 62;
    (bits & !version_and_variant | 0x8000_u128 << 64 | 0b10 << 62).to_be_bytes()
}
