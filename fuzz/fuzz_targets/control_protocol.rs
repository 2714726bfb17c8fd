//! Anything on the control socket, as the machine and as a client read it.
#![no_main]

use machine::control::protocol::{Ended, Reply, Request, read};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    while let Ok(Some((_, payload))) = read(&mut rest) {
        let _ = serde_json::from_slice::<Request>(&payload);
        let _ = serde_json::from_slice::<Reply>(&payload);
        let _ = serde_json::from_slice::<Ended>(&payload);
    }
});
