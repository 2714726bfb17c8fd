//! NBD URIs: `nbd://host:port/export`, `nbd+unix:///export?socket=path`, and with `nbds` the same over TLS.
//!
//! Source: doc/uri.md of the reference implementation, RFC 3986.

use super::wire::{PORT, STRING_MAX};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A host's name or address, and its port.
    Tcp {
        /// The host, an IPv6 address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// An export of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// Where the server is.
    pub place: Place,
    /// The export's name.
    pub export: String,
    /// The connection must be encrypted.
    pub tls: bool,
    /// What else was asked for: names and values, in their order.
    pub parameters: Vec<(String, String)>,
}

/// Why a text is no NBD URI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no NBD URI: {what}")]
pub struct UriError {
    text: String,
    what: String,
}

impl Uri {
    /// Whether a text means to be an NBD URI.
    pub fn looks_like(text: &str) -> bool {
        ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"].iter().any(|scheme| text.starts_with(scheme))
    }

    /// A parameter's value.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        parse(text).map_err(|what| UriError { text: text.to_owned(), what })
    }
}

fn parse(text: &str) -> Result<Uri, String> {
    let (scheme, rest) = text.split_once("://").ok_or("it has no scheme such as nbd://")?;
    let (tls, unix) = match scheme {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        other => return Err(format!("{other} is none of nbd, nbds, nbd+unix, nbds+unix")),
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(path)?;
    if export.len() > STRING_MAX || export.contains('\0') {
        return Err("the export's name is longer than any, or has a NUL".into());
    }
    let mut parameters = Vec::new();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        parameters.push((decode(name)?, decode(value)?));
    }
    let place = if unix {
        if !authority.is_empty() {
            return Err("a Unix socket has no host: write three slashes".into());
        }
        let place = parameters.iter().position(|(name, _)| name == "socket");
        let (_, path) = parameters.remove(place.ok_or("it lacks ?socket=PATH")?);
        Place::Unix(path.into())
    } else {
        tcp(authority)?
    };
    Ok(Uri { place, export, tls, parameters })
}

fn tcp(authority: &str) -> Result<Place, String> {
    let host_and_port = authority.rsplit_once('@').map_or(authority, |(_, rest)| rest);
    let (host, port) = match host_and_port.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("an address has no closing bracket")?;
            (host.to_owned(), rest.strip_prefix(':').unwrap_or(rest))
        }
        None => {
            let (host, port) = host_and_port.split_once(':').unwrap_or((host_and_port, ""));
            (decode(host)?, port)
        }
    };
    let port = match port {
        "" => PORT,
        port => port.parse().map_err(|_| format!("{port:?} is no port"))?,
    };
    Ok(Place::Tcp { host: if host.is_empty() { "localhost".to_owned() } else { host }, port })
}

fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte.unwrap_or(0)).to_digit(16);
        let (Some(high), Some(low)) = (digit(rest.next()), digit(rest.next())) else {
            return Err("a % is not followed by two hexadecimal digits".into());
        };
        bytes.push(u8::try_from(high << 4 | low).unwrap_or(0));
    }
    String::from_utf8(bytes).map_err(|_| "it is no UTF-8".into())
}

/// Percent-encodes all but letters, digits and what is harmless in paths and queries.
fn encode(text: &str) -> String {
    use fmt::Write;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(byte.into());
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.tls { "s" } else { "" };
        let mut parameters: Vec<String> = Vec::new();
        match &self.place {
            Place::Tcp { host, port } => {
                let host = if host.contains(':') { format!("[{host}]") } else { encode(host) };
                write!(f, "nbd{s}://{host}")?;
                if *port != PORT {
                    write!(f, ":{port}")?;
                }
            }
            Place::Unix(path) => {
                write!(f, "nbd{s}+unix://")?;
                parameters.push(format!("socket={}", encode(&path.to_string_lossy())));
            }
        }
        write!(f, "/{}", encode(&self.export))?;
        parameters.extend(
            self.parameters.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value))),
        );
        if parameters.is_empty() { Ok(()) } else { write!(f, "?{}", parameters.join("&")) }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn uris_of_the_document_are_read() {
        let read = |text: &str| text.parse::<Uri>().unwrap();
        assert_eq!(read("nbd://example.com//disk").export, "/disk");
        assert_eq!(read("nbd://example.com/hello%20world").export, "hello world");
        assert_eq!(read("nbd://example.com").place, Place::Tcp { host: "example.com".into(), port: 10809 });
        assert_eq!(read("nbds://[::1]:99/").place, Place::Tcp { host: "::1".into(), port: 99 });
        let unix = read("nbd+unix:///disk?socket=/tmp/a%20b&timeout=3");
        assert_eq!(
            (unix.place.clone(), unix.parameter("timeout")),
            (Place::Unix("/tmp/a b".into()), Some("3"))
        );
        for bad in [
            "nbd:",
            "nbd+unix:///x",
            "nbd://a:b/",
            "nbd://x/%f",
            "http://x/",
            "nbd+unix://h/?socket=x",
            "nbd://[::1/",
        ] {
            assert!(bad.parse::<Uri>().is_err(), "{bad}");
        }
        assert!(Uri::looks_like("nbds+unix:///") && !Uri::looks_like("nbd.img"));
    }

    proptest! {
        #[test]
        fn uris_are_read_as_written(export in "[^\\x00]{0,20}", path in "/[^\\x00]{1,20}", tls: bool, unix: bool, port: u16, v6: bool) {
            let host = if v6 { "fe80::1" } else { "a.example" }.to_owned();
            let place = if unix { Place::Unix(path.into()) } else { Place::Tcp { host, port } };
            let uri = Uri { place, export, tls, parameters: vec![("a&b".into(), "c=d?".into())] };
            prop_assert_eq!(uri.to_string().parse::<Uri>(), Ok(uri));
        }

        #[test]
        fn any_text_is_refused_or_read(text in ".{0,60}") {
            let _ = text.parse::<Uri>();
            let _ = format!("nbd+unix://{text}").parse::<Uri>();
        }
    }
}
