//! The user-mode gateway alone, for whoever is in the current network namespace: `gateway TAP [PID]`.
//!
//! The tap is made in the current namespace and sockets are opened in that of PID (default: the current one too). To compare with
//! slirp4netns and passt: see docs/benchmarks/network.md.

use net::gateway::{Config, Gateway};
use net::tap::Tap;
use net::{Bell, Card};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().ok_or("which tap?")?;
    let tap = Tap::open(&name)?;
    if let Some(process) = arguments.next() {
        let outer = std::fs::File::open(format!("/proc/{process}/ns/net"))?;
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&outer), Some(kind))?;
    }
    let mut config = Config::new([2, 0, 0, 0, 0, 1]);
    config.mtu = std::env::var("MTU").ok().and_then(|mtu| mtu.parse().ok()).unwrap_or(1500);
    config.host_loopback = true;
    let gateway = Gateway::new(config)?;
    let network = gateway.network();
    println!("gateway {}, guest {}/24, {}/64", network.gateway4, network.guest4, network.guest6);
    let card: &dyn Card = &tap;
    Ok(gateway.serve(card, &Bell::new()?)?)
}
