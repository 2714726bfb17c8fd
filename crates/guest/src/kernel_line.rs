//! What the host tells the agent on the kernel's command line. Shared by the host and the agent (`no_std` with `alloc`).
//!
//! - `yado.agent=DEVICE`: the agent talks over `/dev/DEVICE` and nothing else.
//! - `yado.exec=ARG,ARG...`: as init, the agent runs this on the console and switches the machine off. Bytes other than ASCII
//!   letters, digits and `-._/:=+@` are written `%XX`.
//! - `yado.network=MAC,ADDRESS/PREFIX,GATEWAY`: the IPv4 network behind the card with this address, which the agent configures
//!   before it runs commands; the gateway is the name server too.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const HEX: &[u8; 16] = b"0123456789abcdef";

/// The argument that makes the agent, as init, run `argv`.
pub fn exec_argument(argv: &[Vec<u8>]) -> String {
    let mut text = String::from("yado.exec=");
    for (index, argument) in argv.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        for &byte in argument {
            if byte.is_ascii_alphanumeric() || b"-._/:=+@".contains(&byte) {
                text.push(char::from(byte));
            } else {
                let digit = |value: u8| char::from(HEX.get(usize::from(value)).copied().unwrap_or(b'0'));
                text.extend(['%', digit(byte >> 4), digit(byte & 15)]);
            }
        }
    }
    text
}

/// What a guest has to know of its IPv4 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The address of its card.
    pub mac: [u8; 6],
    /// Its own address.
    pub address: [u8; 4],
    /// How many bits of that are the network's.
    pub prefix: u8,
    /// Its router and name server.
    pub gateway: [u8; 4],
}

/// The argument that makes the agent configure a network.
pub fn network_argument(network: &Network) -> String {
    let [a, b, c, d, e, f] = network.mac;
    let [address, gateway] =
        [network.address, network.gateway].map(|[a, b, c, d]| format!("{a}.{b}.{c}.{d}"));
    let prefix = network.prefix;
    format!("yado.network={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x},{address}/{prefix},{gateway}")
}

/// The network in the value of `yado.network`.
pub fn parse_network(value: &[u8]) -> Option<Network> {
    let text = core::str::from_utf8(value).ok()?;
    let mut parts = text.split(',');
    let mut mac = [0; 6];
    let mut bytes = parts.next()?.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(bytes.next()?, 16).ok()?;
    }
    let (address, prefix) = parts.next()?.split_once('/')?;
    let network = Network {
        mac,
        address: dotted(address)?,
        prefix: prefix.parse().ok().filter(|&prefix| prefix <= 32)?,
        gateway: dotted(parts.next()?)?,
    };
    (bytes.next().is_none() && parts.next().is_none()).then_some(network)
}

fn dotted(text: &str) -> Option<[u8; 4]> {
    let mut address = [0; 4];
    let mut bytes = text.split('.');
    for byte in &mut address {
        *byte = bytes.next()?.parse().ok()?;
    }
    bytes.next().is_none().then_some(address)
}

/// The value of the last `name=value` among the words of a kernel command line.
pub fn value<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let words = line.split(|byte| byte.is_ascii_whitespace());
    words.filter_map(|word| word.strip_prefix(name)?.strip_prefix(b"=")).next_back()
}

/// The command in the value of `yado.exec`.
pub fn parse_exec(value: &[u8]) -> Vec<Vec<u8>> {
    value.split(|&byte| byte == b',').map(unescape).collect()
}

fn unescape(word: &[u8]) -> Vec<u8> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let mut bytes = Vec::new();
    let mut rest = word;
    loop {
        rest = match rest {
            [] => return bytes,
            [b'%', high, low, after @ ..] => {
                match (digit(high), digit(low)) {
                    (Some(high), Some(low)) => bytes.push(high << 4 | low),
                    _ => bytes.extend([b'%', *high, *low]),
                }
                after
            }
            [byte, after @ ..] => {
                bytes.push(*byte);
                after
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_command_comes_through(argv in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 1..6)) {
            let line = alloc::format!("quiet {} console=ttyS0\n", exec_argument(&argv));
            prop_assert!(line.is_ascii());
            let value = value(line.as_bytes(), b"yado.exec").unwrap();
            prop_assert_eq!(parse_exec(value), argv);
        }
    }

    proptest! {
        #[test]
        fn a_network_comes_through(mac: [u8; 6], address: [u8; 4], prefix in 0u8..33, gateway: [u8; 4]) {
            let network = Network { mac, address, prefix, gateway };
            let line = alloc::format!("quiet {}\n", network_argument(&network));
            prop_assert_eq!(parse_network(value(line.as_bytes(), b"yado.network").unwrap()), Some(network));
        }

        #[test]
        fn no_value_harms(value in "[0-9a-f:,./]{0,50}") {
            parse_network(value.as_bytes());
        }
    }

    #[test]
    fn words_are_found_whole() {
        let line = b"ro xyado.agent=no yado.agent=hvc0 yado.agent=ttyS1\n";
        assert_eq!(value(line, b"yado.agent"), Some(&b"ttyS1"[..]));
        assert_eq!(value(line, b"yado"), None);
        assert_eq!(parse_exec(b"a%2cb%zz,"), [b"a,b%zz".to_vec(), Vec::new()]);
    }
}
