//! The network that the host describes on the kernel's command line, configured before the first command runs: the system's own
//! network daemon would do so only when udev has found the card, late in the boot. It finds what it would have made itself.
//!
//! IPv6 needs nothing: once the link is up, the kernel takes addresses and router from the gateway's advertisements.

use alloc::ffi::CString;
use alloc::format;
use alloc::vec::Vec;

use crate::kernel_line::{self, Network};
use crate::{modules, sys};

const CARDS: &[u8] = b"/sys/class/net/";
/// A card without a driver never comes.
const WAIT_MS_MAX: i64 = 5_000;
/// The driver and what it needs.
const MODULES: [&[u8]; 3] =
    [b"net/core/failover", b"drivers/net/net_failover", b"drivers/net/virtio_net"];

/// Configures the network, if the host describes one. What goes wrong shows in that there is none.
pub fn prepare() {
    let line = sys::read_file(c"/proc/cmdline", 4096).unwrap_or_default();
    let Some(network) = kernel_line::value(&line, b"yado.network").and_then(kernel_line::parse_network) else {
        return;
    };
    let Some(name) = card(&network.mac) else { return };
    if sys::configure_ipv4(&name, network.address, network.prefix, network.gateway).is_ok() {
        let [a, b, c, d] = network.gateway;
        let text = format!("nameserver {a}.{b}.{c}.{d}\nsearch yado\n");
        // A file that is there is the administrator's, or says the same.
        let _ = sys::create_file(c"/etc/resolv.conf", 0o644).and_then(|file| sys::write(&file, text.as_bytes()));
    }
}

/// The name of the card with this address, waited for.
fn card(mac: &[u8; 6]) -> Option<Vec<u8>> {
    if let Some(name) = find(mac) {
        return Some(name);
    }
    modules::load_virtio_driver(&MODULES);
    let began = sys::monotonic_ms();
    loop {
        if let Some(name) = find(mac) {
            return Some(name);
        }
        if sys::monotonic_ms() - began > WAIT_MS_MAX {
            return None;
        }
        sys::sleep(5);
    }
}

fn find(mac: &[u8; 6]) -> Option<Vec<u8>> {
    let [a, b, c, d, e, f] = mac;
    let wanted = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    let names = CString::new(CARDS).ok().and_then(|path| sys::directory(&path).ok())?;
    names.into_iter().find(|name| {
        let path = CString::new([CARDS, name, b"/address"].concat());
        let address = path.ok().and_then(|path| sys::read_file(&path, 64).ok()).unwrap_or_default();
        address.trim_ascii() == wanted.as_bytes()
    })
}
