//! A tap: a network interface of the host's whose cable ends in this process.
//!
//! Offloads are the kernel's own form ([`crate::offload`]), so that large segments and incomplete checksums go through
//! untouched both ways. [`Tap`] is a [`Card`] itself (to serve whoever is in the host's network with the gateway, say), and
//! serves one.

use crate::batch::{Batch, FRAME_MAX};
use crate::card::{Bell, Card, Stall};
use crate::offload::{HEADER_LEN, Offload};
use crate::sys;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::time::Timespec;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The longest name of an interface.
const NAME_MAX: usize = 15;
/// From linux/if_tun.h.
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;
const TUN_F_TSO_ECN: u32 = 8;
const TUN_F_USO: u32 = 0x20 | 0x40;
const TUN_F_TSO: u32 = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that no interface can have.
    #[error("{name:?} is no name of a network interface: 1 to {NAME_MAX} characters without / and space")]
    Name {
        /// The name.
        name: String,
    },
    /// The host has no taps, or not for this user.
    #[error(
        "cannot open /dev/net/tun: {source}; the kernel needs its tun driver, and this user access to the file"
    )]
    Open {
        /// The host's reason.
        source: io::Error,
    },
    /// The tap cannot be used.
    #[error("cannot use the tap {name}: {source}{}", cure(name, source))]
    Attach {
        /// Its name.
        name: String,
        /// The host's reason.
        source: io::Error,
    },
}

fn cure(name: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => format!(
            "; root may make it for this user: ip tuntap add dev {name} mode tap user $USER && ip link set {name} up"
        ),
        io::ErrorKind::ResourceBusy => "; another program has it".into(),
        io::ErrorKind::InvalidInput => format!("; is {name} an interface that is no tap?"),
        _ => String::new(),
    }
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
}

impl Tap {
    /// Opens the tap `name`, which is made (and is gone with this process) if it is not there.
    pub fn open(name: &str) -> Result<Self, Error> {
        let sound = (1..=NAME_MAX).contains(&name.len())
            && !name.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control());
        if !sound {
            return Err(Error::Name { name: name.into() });
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
            .map_err(|error| Error::Open { source: error.into() })?;
        // A tap that was made with one queue, or with several, wants to be opened so.
        let attached = match sys::attach_tap(&file, name, false) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => sys::attach_tap(&file, name, true),
            done => done,
        };
        attached.map_err(|source| Error::Attach { name: name.into(), source })?;
        // Datagrams to be cut are younger than the rest (Linux 6.2). Without any, all frames arrive finished.
        let _ = sys::set_tap_offloads(&file, TUN_F_TSO | TUN_F_USO)
            .or_else(|_| sys::set_tap_offloads(&file, TUN_F_TSO));
        Ok(Self { file })
    }

    /// The file that is readable when there are frames.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Reads one frame into a batch that has room; answers whether there was one.
    fn read(&self, batch: &mut Batch) -> Result<bool, Errno> {
        let mut header = [0; HEADER_LEN];
        let room = batch.room(FRAME_MAX);
        let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(room)];
        match rustix::io::readv(&self.file, &mut parts) {
            Ok(len) => {
                let len = len.saturating_sub(HEADER_LEN);
                let frame = room.get(..len).unwrap_or_default();
                if let Ok(offload) = Offload::checked(header, frame) {
                    batch.commit(offload, len);
                }
                Ok(true)
            }
            Err(Errno::AGAIN) => Ok(false),
            Err(Errno::INTR) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Sends one frame; answers whether the tap took it, or never will.
    pub(crate) fn send(&self, offload: &Offload, frame: &[u8]) -> bool {
        let header = offload.encode();
        let parts = [IoSlice::new(&header), IoSlice::new(frame)];
        // A frame that the kernel refuses, or that comes while the interface is down, is lost.
        !matches!(rustix::io::writev(&self.file, &parts), Err(Errno::AGAIN))
    }

    /// Carries frames between a card and the tap until the card's bell is closed.
    pub fn serve(&self, card: &dyn Card, bell: &Bell) -> io::Result<()> {
        let (mut up, mut down) = (Batch::new(64, 512 << 10), Batch::new(64, 512 << 10));
        let (mut more, mut stall) = (true, Stall::default());
        loop {
            if bell.closed() {
                return Ok(());
            }
            // What was rung for while frames waited for the tap is remembered.
            more |= bell.answer();
            if more && up.is_empty() {
                more = card.take(&mut up);
            }
            while let Some((offload, frame)) = up.first() {
                if !self.send(&offload, frame) {
                    break;
                }
                up.pop();
            }
            let mut drained = false;
            while down.has_room() && !drained {
                drained = !self.read(&mut down)?;
            }
            let stalled = stall.give(card, &mut down);
            if (more && up.is_empty()) || (!drained && down.has_room()) || !bell.doze() {
                continue;
            }
            // Frames are waited for where there is room for them: what the guest does not take it will ring for.
            let mut interest = PollFlags::empty();
            interest.set(PollFlags::IN, down.has_room());
            interest.set(PollFlags::OUT, !up.is_empty());
            let mut files = [PollFd::new(bell, PollFlags::IN), PollFd::new(&self.file, interest)];
            let wait = stalled.and_then(|wait| Timespec::try_from(wait).ok());
            match poll(&mut files, wait.as_ref()) {
                Ok(_) | Err(Errno::INTR) => bell.wake(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Card for Tap {
    fn take(&self, batch: &mut Batch) -> bool {
        while batch.has_room() {
            if !self.read(batch).unwrap_or(false) {
                return false;
            }
        }
        true
    }

    fn give(&self, batch: &mut Batch) {
        while let Some((offload, frame)) = batch.first() {
            if !self.send(&offload, frame) {
                return;
            }
            batch.pop();
        }
    }

    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    /// A card that has as many frames as are left, and hears none.
    struct Sender(AtomicUsize);

    impl Card for Sender {
        fn take(&self, batch: &mut Batch) -> bool {
            while batch.has_room() {
                let left =
                    self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
                if left.is_err() {
                    return false;
                }
                batch.push(Offload::default(), &[&[7; 1000]]);
            }
            true
        }
        fn give(&self, batch: &mut Batch) {
            batch.clear();
        }
    }

    #[test]
    fn a_ring_while_the_tap_has_no_room_is_not_forgotten() {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (file, host) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        sockopt::set_socket_send_buffer_size(&file, 4096).unwrap();
        let (card, bell) = (Sender(AtomicUsize::new(20)), Bell::new().unwrap());
        let until = |what: &dyn Fn() -> bool| {
            let began = Instant::now();
            while !what() {
                assert!(began.elapsed() < Duration::from_secs(20));
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| Tap { file }.serve(&card, &bell).unwrap());
            until(&|| card.0.load(Ordering::SeqCst) == 0);
            // It blocks now; what is sent meanwhile is rung for once.
            std::thread::sleep(Duration::from_millis(20));
            card.0.store(5, Ordering::SeqCst);
            bell.ring();
            std::thread::sleep(Duration::from_millis(20));
            let frame = [0; HEADER_LEN + 1000];
            for _ in 0..25 {
                until(&|| rustix::io::read(&host, &mut frame.clone()).is_ok());
            }
            bell.close();
        });
    }
}
