//! Cards of guests whose frames the guest's own process carries: those of `--net user` and of taps.

use crate::{client, registry};
use anyhow::Result;
use machine::control::protocol::{Kind, PAYLOAD_MAX, Request};
use serde_json::{Value, json};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Bytes in front of each frame of the control protocol: kind and length.
const HEAD: usize = 5;

/// The running guests with their cards, told as the ports of a switch are.
pub fn all() -> Vec<(String, Value)> {
    let guests = registry::list().unwrap_or_default();
    let running = guests.into_iter().filter(|guest| guest.running).map(|guest| guest.record.name);
    running
        .filter_map(|name| {
            // One that just starts or stops has nothing to tell.
            let tree = client::ask(&name, &Request::Networks).ok()?;
            Some((name, json!({ "ports": tree["cards"] })))
        })
        .collect()
}

/// Begins to look at a guest's frames.
pub fn capture(guest: &str, snap: u32) -> Result<Capture> {
    registry::find_running(guest)?;
    let (stream, _) = client::open(guest, &Request::Capture { snap })?;
    Ok(Capture { stream, raw: Vec::new(), ready: Vec::new(), over: false })
}

/// The bytes that a guest's process sends, out of the frames that they come in.
pub struct Capture {
    stream: UnixStream,
    raw: Vec<u8>,
    ready: Vec<u8>,
    over: bool,
}

impl Capture {
    /// How long one read waits.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(patience))
    }
}

/// Takes whole frames out of `raw`: output goes to `ready`; answers whether the stream is over.
fn unpack(raw: &mut Vec<u8>, ready: &mut Vec<u8>) -> io::Result<bool> {
    let mut at = 0;
    let mut over = false;
    while let Some([kind, len @ ..]) = raw.get(at..).and_then(<[u8]>::first_chunk::<HEAD>) {
        let len = u32::from_le_bytes(*len) as usize;
        if len > PAYLOAD_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a frame of yado's control protocol"));
        }
        let Some(payload) = raw.get(at + HEAD..at + HEAD + len) else { break };
        if *kind == Kind::Output as u8 {
            ready.extend_from_slice(payload);
        }
        over |= *kind == Kind::Ended as u8;
        at += HEAD + len;
    }
    raw.drain(..at);
    Ok(over)
}

impl Read for Capture {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.ready.is_empty() && !self.over {
            let mut bytes = [0; 1 << 16];
            let count = self.stream.read(&mut bytes)?;
            self.over = count == 0;
            self.raw.extend_from_slice(bytes.get(..count).unwrap_or_default());
            self.over |= unpack(&mut self.raw, &mut self.ready)?;
        }
        let count = self.ready.len().min(into.len());
        into.iter_mut().zip(self.ready.drain(..count)).for_each(|(to, byte)| *to = byte);
        Ok(count)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use machine::control::protocol::write;

    #[test]
    fn a_capture_comes_out_of_its_frames_however_they_are_cut() {
        let mut wire = Vec::new();
        write(&mut wire, Kind::Output, b"first").unwrap();
        write(&mut wire, Kind::Output, b"").unwrap();
        write(&mut wire, Kind::Output, b"second").unwrap();
        write(&mut wire, Kind::Ended, b"{}").unwrap();
        for cut in 0..=wire.len() {
            let (mut raw, mut ready) = (wire[..cut].to_vec(), Vec::new());
            let early = unpack(&mut raw, &mut ready).unwrap();
            assert_eq!(early, cut == wire.len());
            raw.extend(&wire[cut..]);
            assert!(early || unpack(&mut raw, &mut ready).unwrap());
            assert_eq!((ready.as_slice(), raw.len()), (b"firstsecond".as_slice(), 0));
        }
        assert!(unpack(&mut vec![4, 0xff, 0xff, 0xff, 0xff], &mut Vec::new()).is_err());
    }
}
