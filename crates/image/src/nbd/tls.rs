//! TLS for both ends: certificates from a directory, laid out as qemu, libnbd and nbdkit want it.
//!
//! | file | who needs it |
//! |---|---|
//! | `ca-cert.pem` | clients, to know the server; servers that want to know their clients |
//! | `server-cert.pem`, `server-key.pem` | servers |
//! | `client-cert.pem`, `client-key.pem` | clients of such servers |
//!
//! TLS 1.2 and 1.3, by rustls; nothing of it is our own.

use crate::Error;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where Debian keeps the authorities that everybody believes.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

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
    Allowed(Arc<ServerConfig>),
    /// For all clients.
    Required(Arc<ServerConfig>),
}

fn fail(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::Unsupported { path: path.to_path_buf(), what: format!("it is no part of a TLS set-up: {what}") }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    read.map_err(|error| fail(path, error))
}

fn authorities(path: &Path) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    let (good, _) = roots.add_parsable_certificates(certificates(path)?);
    if good == 0 {
        return Err(fail(path, "no certificate of an authority is in it"));
    }
    Ok(Arc::new(roots))
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| fail(path, error))
}

impl Tls {
    /// TLS with the certificate and key in a directory. With `verify` clients must show a certificate of the authority
    /// there.
    pub fn load(directory: &Path, policy: Policy, verify: bool) -> Result<Self, Error> {
        let place = |name: &str| directory.join(name);
        let failed = |error: &dyn std::fmt::Display| fail(directory, error);
        let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| failed(&error))?;
        let builder = if verify {
            let roots = authorities(&place("ca-cert.pem"))?;
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| failed(&error))?)
        } else {
            builder.with_no_client_auth()
        };
        let own = certificates(&place("server-cert.pem"))?;
        let config = builder.with_single_cert(own, key(&place("server-key.pem"))?);
        let config = Arc::new(config.map_err(|error| failed(&error))?);
        Ok(match policy {
            Policy::Off => Self::Off,
            Policy::Allowed => Self::Allowed(config),
            Policy::Required => Self::Required(config),
        })
    }

    /// What clients must do.
    pub fn policy(&self) -> Policy {
        match self {
            Self::Off => Policy::Off,
            Self::Allowed(_) => Policy::Allowed,
            Self::Required(_) => Policy::Required,
        }
    }

    /// A session for one client.
    pub(super) fn session(&self) -> io::Result<rustls::Connection> {
        let (Self::Allowed(config) | Self::Required(config)) = self else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let session = rustls::ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        Ok(session.into())
    }
}

/// TLS of a client: whom it believes, who it is, and whom it wants to talk with.
#[derive(Debug, Clone)]
pub(super) struct ClientTls {
    config: Arc<ClientConfig>,
    server: ServerName<'static>,
}

impl ClientTls {
    /// Certificates from a directory; without one, the authorities of the system and no certificate of its own.
    pub(super) fn load(directory: Option<&Path>, server: &str) -> Result<Self, Error> {
        let place = |name: &str| directory.map(|directory| directory.join(name));
        let path = place("ca-cert.pem").unwrap_or_else(|| PathBuf::from(SYSTEM_AUTHORITIES));
        let verifier = WebPkiServerVerifier::builder_with_provider(authorities(&path)?, provider()).build();
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| fail(&path, error))?;
        let builder = builder.with_webpki_verifier(verifier.map_err(|error| fail(&path, error))?);
        let config = match place("client-cert.pem").filter(|path| path.exists()) {
            None => builder.with_no_client_auth(),
            Some(own) => {
                let secret = key(&place("client-key.pem").unwrap_or_default())?;
                let config = builder.with_client_auth_cert(certificates(&own)?, secret);
                config.map_err(|error| fail(&own, error))?
            }
        };
        let wrong = || Error::Options(format!("{server:?} is no name that a certificate can have"));
        let server = ServerName::try_from(server.to_owned()).map_err(|_| wrong())?;
        Ok(Self { config: Arc::new(config), server })
    }

    /// A session with the server.
    pub(super) fn session(&self) -> io::Result<rustls::Connection> {
        let session = rustls::ClientConnection::new(self.config.clone(), self.server.clone());
        Ok(session.map_err(io::Error::other)?.into())
    }
}
