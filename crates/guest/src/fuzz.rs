//! An entry for fuzzing the host's half of the protocol.

use crate::client::{Client, Event, OUTPUT_WINDOW, SessionId};
use crate::message::{Exec, ToHost, VERSION};
use crate::peer::SESSIONS_MAX;
use crate::wire::{DATA_MAX, Outbox};

/// Plays a hostile guest against a [`Client`]: bytes of `data` choose what the host does, and the frames and raw bytes that it
/// receives. Panics if the client breaks its promises (memory, order of a session's events).
pub fn fuzz_client(data: &[u8]) {
    let mut client = Client::new(0);
    let mut live: Vec<SessionId> = Vec::new();
    let mut rest = data;
    let mut nonce = 1u64;
    while let Some((&action, after)) = rest.split_first() {
        rest = after;
        let length = usize::from(action >> 3);
        let (bytes, after) = rest.split_at_checked(length).unwrap_or((rest, &[]));
        let mut frames = Outbox::default();
        match action & 7 {
            0 => client.receive(bytes),
            1 => {
                // Well-formed frames get further than noise does.
                if let Some((&kind, payload)) = bytes.split_first() {
                    let session = u32::from(payload.first().copied().unwrap_or(0) & 3);
                    frames.frame(kind | 0x80, session, payload);
                }
            }
            2 => {
                let (version, stdin_window) = (VERSION, 1000);
                ToHost::Ready { version, nonce, build: 0, stdin_window }.send(0, &mut frames);
                nonce = nonce.wrapping_add(1);
            }
            3 => {
                let session = u32::from(bytes.first().copied().unwrap_or(0) & 3);
                ToHost::Started(1).send(session, &mut frames);
            }
            4 => {
                if let Ok(session) = client.exec(Exec { argv: vec![b"x".to_vec()], ..Exec::default() }) {
                    live.push(session);
                }
            }
            5 => {
                if let Some(&session) = live.last() {
                    let _ = client.stdin(session, bytes);
                    let _ = client.stdin_eof(session);
                }
            }
            6 => drain(&mut client, &mut live),
            _ => {
                if let Some(&session) = live.first() {
                    client.abandon(session);
                }
                client.nudge();
            }
        }
        rest = if matches!(action & 7, 2 | 4 | 6 | 7) { rest } else { after };
        client.receive(frames.pending());
        client.sent(client.pending().len());
        assert!(client.held() <= SESSIONS_MAX.saturating_mul(2 * OUTPUT_WINDOW).saturating_add(DATA_MAX * 2));
    }
    drain(&mut client, &mut live);
}

fn drain(client: &mut Client, live: &mut Vec<SessionId>) {
    while let Some(event) = client.poll_event() {
        match event {
            Event::Output { session, stream, bytes } => {
                assert!(live.contains(&session), "output of a session that is over");
                client.consumed(session, stream, bytes.len());
            }
            Event::Exited { session, .. }
            | Event::Failed { session, .. }
            | Event::SessionLost { session, .. } => {
                let place = live.iter().position(|known| *known == session);
                assert!(place.map(|place| live.swap_remove(place)).is_some(), "a session was over twice");
            }
            Event::Started { session, .. } => {
                assert!(live.contains(&session), "a session began after its end")
            }
            _ => {}
        }
    }
}
