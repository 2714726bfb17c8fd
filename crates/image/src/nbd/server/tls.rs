//! Whether a server's connections are encrypted.

use std::io;
use std::sync::Arc;

/// What clients must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// There is no TLS.
    Off,
    /// Clients may encrypt.
    Allowed,
    /// Clients must encrypt before anything else.
    Required,
}

/// TLS of a server.
#[derive(Clone, Default)]
pub enum Tls {
    /// None.
    #[default]
    Off,
    /// For clients that want it.
    Allowed(Arc<rustls::ServerConfig>),
    /// For all clients.
    Required(Arc<rustls::ServerConfig>),
}

impl Tls {
    /// What clients must do.
    pub fn policy(&self) -> Policy {
        match self {
            Self::Off => Policy::Off,
            Self::Allowed(_) => Policy::Allowed,
            Self::Required(_) => Policy::Required,
        }
    }

    /// A session for one client.
    pub fn session(&self) -> io::Result<rustls::Connection> {
        let (Self::Allowed(config) | Self::Required(config)) = self else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let session = rustls::ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        Ok(session.into())
    }
}
