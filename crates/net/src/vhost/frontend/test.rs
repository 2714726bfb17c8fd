//! A back end of others, as far as it is asked.

use super::*;

#[test]
fn what_the_driver_agreed_on_about_its_rings_is_not_said_of_these() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let of_others = feature::RING_PACKED | feature::IN_ORDER | feature::INDIRECT_DESC;
    let offered = feature::VERSION_1 | feature::MRG_RXBUF | of_others;
    let back_end = std::thread::spawn(move || {
        let mut channel = Channel::new(theirs);
        loop {
            let Some(message) = channel.receive().unwrap() else {
                poll(&mut [PollFd::new(&channel, PollFlags::IN)], None).unwrap();
                continue;
            };
            match message.header.request {
                request::GET_FEATURES => {
                    let flags = flag::VERSION | flag::REPLY;
                    let header = Header { request: request::GET_FEATURES, flags, size: 8 };
                    channel.send(header, &offered.to_ne_bytes(), &[]).unwrap();
                }
                request::SET_FEATURES => return Body(&message.body).u64().unwrap(),
                _ => {}
            }
        }
    });
    let mut front = Frontend::new(ours, 2, 16).unwrap();
    // It may be gone before all is said.
    let _ = front.start(offered, &[], 2);
    assert_eq!(back_end.join().unwrap(), feature::VERSION_1 | feature::MRG_RXBUF);
}
