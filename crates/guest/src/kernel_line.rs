//! What the host tells the agent on the kernel's command line. Shared by the host and the agent (`no_std` with `alloc`).
//!
//! - `yado.agent=DEVICE`: the agent talks over `/dev/DEVICE` and nothing else.
//! - `yado.exec=ARG,ARG...`: as init, the agent runs this on the console and switches the machine off. Bytes other than ASCII
//!   letters, digits and `-._/:=+@` are written `%XX`.

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

    #[test]
    fn words_are_found_whole() {
        let line = b"ro xyado.agent=no yado.agent=hvc0 yado.agent=ttyS1\n";
        assert_eq!(value(line, b"yado.agent"), Some(&b"ttyS1"[..]));
        assert_eq!(value(line, b"yado"), None);
        assert_eq!(parse_exec(b"a%2cb%zz,"), [b"a,b%zz".to_vec(), Vec::new()]);
    }
}
