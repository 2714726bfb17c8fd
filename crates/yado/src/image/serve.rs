//! `yado image serve`: images for NBD clients.

use super::{open, options, print_json};
use crate::signals;
use crate::size::Size;
use anyhow::{Context, Result};
use clap::builder::ValueHint;
use clap::{Args, ValueEnum};
use image::nbd::{Export, Limits, Listener, Place, Policy, Server, Statistics, Tls, Uri};
use image::storage::CacheMode;
use image::{DetectZeroes, Disk, Image, OpenOptions};
use indicatif::{ProgressBar, ProgressStyle};
use options::usage;
use std::io::IsTerminal;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// How often the line on the terminal changes, and Ctrl-C is looked for.
const PERIOD: Duration = Duration::from_millis(100);
/// How long no client may be there for `--once` after one was.
const LAST_LEFT: u32 = 2;

#[derive(Debug, Args)]
pub struct Serve {
    /// Unix socket to make; repeatable
    #[arg(short = 'k', long, visible_alias = "unix", value_name = "PATH", value_hint = ValueHint::FilePath)]
    #[arg(required_unless_present = "listen")]
    pub socket: Vec<PathBuf>,
    /// TCP address to listen at: ADDRESS:PORT, or :PORT on all addresses; repeatable
    #[arg(short = 't', long, visible_alias = "tcp", value_name = "ADDRESS:PORT")]
    pub listen: Vec<String>,
    /// Name of the export, where there is one image (default: the empty name, which clients ask for when told no other)
    #[arg(short = 'x', long, value_name = "NAME")]
    pub export: Option<String>,
    /// What the images are, for people who list them
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// Format of the images that say none
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Let nobody write
    #[arg(short = 'r', long)]
    pub read_only: bool,
    /// Serve an internal snapshot of the images that say none, read-only
    #[arg(short = 'l', long, value_name = "NAME")]
    pub snapshot: Option<String>,
    /// Serve though somebody else may write the images; read-only
    #[arg(short = 'U', long, requires = "read_only")]
    pub force_share: bool,
    /// Encrypt: a directory with server-cert.pem and server-key.pem
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath)]
    pub tls_certificates: Option<PathBuf>,
    /// What clients must do where there are certificates
    #[arg(long, value_enum, value_name = "WHAT", default_value = "required", requires = "tls_certificates")]
    pub tls: TlsPolicy,
    /// Clients must show a certificate of the authority in ca-cert.pem
    #[arg(long, requires = "tls_certificates")]
    pub tls_verify_clients: bool,
    /// What stands between writes and stable storage: writeback, none, writethrough, directsync or unsafe
    #[arg(long, value_name = "MODE", default_value = "writeback")]
    pub cache: CacheMode,
    /// What becomes of zeroes that are written: off, on (written the quick way) or unmap (they may take no space)
    #[arg(long, value_name = "HOW", default_value = "off")]
    pub detect_zeroes: DetectZeroes,
    /// Clients at a time; more wait
    #[arg(short = 'e', long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub clients: u32,
    /// End when the last client has left
    #[arg(long)]
    pub once: bool,
    /// Say what is served, and in the end what was done, as JSON
    #[arg(long)]
    pub json: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// [NAME=]FILE[,format=FORMAT][,snapshot=NAME][,readonly]: an image, and the name of its export where there are several
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<Served>,
}

/// What clients must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TlsPolicy {
    /// Encrypt if they want to
    Allowed,
    /// Encrypt before anything else
    Required,
}

/// An image on the command line. What is before `=` is a name only without a slash: `./a=b.img` is a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    pub name: Option<String>,
    pub file: PathBuf,
    pub format: Option<String>,
    pub snapshot: Option<String>,
    pub read_only: bool,
}

impl FromStr for Served {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let (name, file) = match first.split_once('=') {
            Some(("file", file)) => (None, file),
            Some((name, file)) if !name.contains('/') => (Some(name.to_owned()), file),
            _ => (None, first),
        };
        if file.is_empty() {
            return Err("an image begins with a file name".into());
        }
        let mut image = Self { name, file: file.into(), format: None, snapshot: None, read_only: false };
        for option in parts {
            match option.split_once('=').unwrap_or((option, "")) {
                ("format", name) => image.format = Some(name.to_owned()),
                ("snapshot", name) => image.snapshot = Some(name.to_owned()),
                ("readonly", "" | "on") => image.read_only = true,
                ("readonly", "off") => image.read_only = false,
                (other, _) => {
                    return Err(format!("{other:?} is no option; there are format=, snapshot=, readonly"));
                }
            }
        }
        Ok(image)
    }
}

/// Serves until the user has had enough.
pub fn serve(arguments: &Serve) -> Result<()> {
    serve_with(arguments, Ok, || Ok(()))
}

/// As [`serve`], with disks that `dress` puts something in front of; `ready` hears when clients can come.
pub fn serve_with(
    arguments: &Serve,
    dress: impl Fn(Arc<dyn Disk>) -> Result<Arc<dyn Disk>>,
    ready: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let mut images = Vec::new();
    let mut exports = Vec::new();
    for served in &arguments.images {
        let (image, disk) = open_served(arguments, served)?;
        let disk = dress(arguments.detect_zeroes.on(disk))?;
        exports.push(Export {
            name: name_of(arguments, served)?,
            description: arguments.description.clone(),
            read_only: arguments.read_only || served.read_only || disk.read_only(),
            disk,
        });
        images.push(image);
    }
    let rows: Vec<Row> =
        exports.iter().zip(&arguments.images).map(|(export, served)| Row::of(export, served)).collect();
    // Sockets that are made go again.
    let _watching = signals::watching();
    let limits = Limits { connections_max: arguments.clients as usize, ..Limits::default() };
    let server = Server::new(exports, limits, tls(arguments)?)?;
    let (listeners, places) = listen(arguments)?;
    tell(arguments, &rows, &places)?;
    ready()?;
    std::thread::scope(|scope| -> Result<()> {
        let accepting: Vec<_> =
            listeners.iter().map(|listener| scope.spawn(|| server.accept(listener))).collect();
        watch(arguments, &server, || accepting.iter().any(|thread| thread.is_finished()));
        server.stop();
        for thread in accepting {
            let accepted =
                thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread has failed")));
            accepted.context("cannot take clients any more")?;
        }
        Ok(())
    })?;
    for image in &images {
        image.close()?;
    }
    summary(arguments, &server.statistics())
}

fn tls(arguments: &Serve) -> Result<Tls> {
    let Some(directory) = &arguments.tls_certificates else { return Ok(Tls::Off) };
    let policy = match arguments.tls {
        TlsPolicy::Allowed => Policy::Allowed,
        TlsPolicy::Required => Policy::Required,
    };
    Ok(Tls::load(directory, policy, arguments.tls_verify_clients)?)
}

fn open_served(arguments: &Serve, served: &Served) -> Result<(Image, Arc<dyn Disk>)> {
    let snapshot = served.snapshot.as_ref().or(arguments.snapshot.as_ref());
    let read_only = arguments.read_only || served.read_only || snapshot.is_some();
    let how = OpenOptions {
        read_only,
        shared: arguments.force_share,
        cache: arguments.cache,
        ..OpenOptions::default()
    };
    let format = served.format.as_deref().or(arguments.format.as_deref());
    let image = open(&served.file, format, how)?;
    let disk: Arc<dyn Disk> = match snapshot {
        None => image.disk.clone(),
        Some(name) => {
            let at = image.as_qcow2("internal snapshots")?.at_snapshot(name);
            Arc::new(at.with_context(|| format!("cannot serve {}", served.file.display()))?)
        }
    };
    Ok((image, disk))
}

fn name_of(arguments: &Serve, served: &Served) -> Result<String> {
    match (&served.name, &arguments.export, arguments.images.len()) {
        (Some(_), Some(_), _) => Err(usage("say the export's name once: NAME=FILE, or --export")),
        (Some(name), None, _) => Ok(name.clone()),
        (None, Some(name), 1) => Ok(name.clone()),
        (None, None, 1) => Ok(String::new()),
        (None, _, _) => Err(usage(format!("several images need names: NAME={}", served.file.display()))),
    }
}

/// What is told of an export.
struct Row {
    name: String,
    file: PathBuf,
    size: u64,
    read_only: bool,
}

impl Row {
    fn of(export: &Export, served: &Served) -> Self {
        Self {
            name: export.name.clone(),
            file: served.file.clone(),
            size: export.disk.capacity(),
            read_only: export.read_only,
        }
    }
}

fn listen(arguments: &Serve) -> Result<(Vec<Listener>, Vec<Place>)> {
    let mut listeners = Vec::new();
    let mut places = Vec::new();
    for path in &arguments.socket {
        let listener = Listener::unix(path);
        listeners.push(listener.with_context(|| format!("cannot listen at {}", path.display()))?);
        places.push(Place::Unix(std::path::absolute(path)?));
    }
    for text in &arguments.listen {
        let listener = Listener::tcp(address(text)?).with_context(|| format!("cannot listen at {text}"))?;
        if let Some(address) = listener.address() {
            places.push(Place::Tcp { host: address.ip().to_string(), port: address.port() });
        }
        listeners.push(listener);
    }
    Ok((listeners, places))
}

fn address(text: &str) -> Result<SocketAddr> {
    let full = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
    let found = full.to_socket_addrs().ok().and_then(|mut found| found.next());
    found.ok_or_else(|| usage(format!("{text:?} is no address to listen at: write 127.0.0.1:10809")))
}

fn tell(arguments: &Serve, rows: &[Row], places: &[Place]) -> Result<()> {
    let uris = |row: &Row| -> Vec<String> {
        let uri = |place: &Place| Uri {
            place: place.clone(),
            export: row.name.clone(),
            tls: arguments.tls_certificates.is_some() && arguments.tls == TlsPolicy::Required,
            parameters: Vec::new(),
        };
        places.iter().map(|place| uri(place).to_string()).collect()
    };
    if arguments.json {
        let rows = rows.iter().map(|row| {
            serde_json::json!({
                "name": row.name,
                "filename": row.file,
                "virtual-size": row.size,
                "read-only": row.read_only,
                "uris": uris(row),
            })
        });
        return print_json(&serde_json::json!({ "exports": rows.collect::<Vec<_>>() }));
    }
    if !arguments.quiet {
        for row in rows {
            let mode = if row.read_only { ", read-only" } else { "" };
            println!("{}: {}{mode}", row.file.display(), Size(row.size));
            uris(row).iter().for_each(|uri| println!("  {uri}"));
        }
    }
    Ok(())
}

fn line(now: &Statistics) -> String {
    let clients = if now.connections == 1 { "client" } else { "clients" };
    format!(
        "{} {clients}, {} requests, {} read, {} written",
        now.connections,
        now.requests,
        Size(now.read),
        Size(now.written)
    )
}

/// Shows what happens until the user, or `--once`, ends it.
fn watch(arguments: &Serve, server: &Server, broken: impl Fn() -> bool) {
    let shown = !arguments.quiet && !arguments.json && std::io::stderr().is_terminal();
    let bar = if shown { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("yado: {msg}") {
        bar.set_style(style);
    }
    let mut without = 0;
    while !signals::cancelled() && !broken() {
        std::thread::park_timeout(PERIOD);
        let now = server.statistics();
        if shown {
            bar.set_message(line(&now));
            bar.tick();
        }
        without = if now.connections == 0 && now.connections_ever > 0 { without + 1 } else { 0 };
        if arguments.once && without >= LAST_LEFT {
            break;
        }
    }
    bar.finish_and_clear();
}

fn summary(arguments: &Serve, done: &Statistics) -> Result<()> {
    if arguments.json {
        return print_json(&serde_json::json!({
            "connections": done.connections_ever,
            "requests": done.requests,
            "bytes-read": done.read,
            "bytes-written": done.written,
        }));
    }
    if !arguments.quiet {
        let clients = if done.connections_ever == 1 { "client" } else { "clients" };
        println!(
            "Served {} {clients}: {} requests, {} read, {} written.",
            done.connections_ever,
            done.requests,
            Size(done.read),
            Size(done.written)
        );
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn images_are_read_and_nonsense_refused() {
        let plain: Served = "a.img".parse().unwrap();
        assert_eq!((plain.name, plain.file), (None, "a.img".into()));
        let named: Served = "disk=b.qcow2,format=qcow2,readonly".parse().unwrap();
        assert_eq!((named.name.as_deref(), named.format.as_deref()), (Some("disk"), Some("qcow2")));
        assert!(named.read_only && named.snapshot.is_none());
        let file: Served = "./a=b.img,snapshot=s".parse().unwrap();
        assert_eq!((file.name, file.file, file.snapshot), (None, "./a=b.img".into(), Some("s".into())));
        for bad in ["", "x=", "a.img,colour=red"] {
            assert!(bad.parse::<Served>().is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_may_leave_the_host_out() {
        assert_eq!(address(":99").unwrap().port(), 99);
        assert_eq!(address("127.0.0.1:0").unwrap().to_string(), "127.0.0.1:0");
        assert!(address("nowhere").is_err());
    }
}
