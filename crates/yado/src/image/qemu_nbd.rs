//! yado by the name `qemu-nbd`: that program's arguments and exit codes, for scripts that were written for it.
//!
//! What it does is `yado image serve`. What yado has not (the kernel's own client, temporary snapshots, tracing, listing other
//! servers) is refused in words.

use super::serve::{Serve, Served, TlsPolicy, serve_with};
use anyhow::{Context, Result, bail};
use clap::Parser;
use image::storage::CacheMode;
use image::{Buffers, DetectZeroes, Disk, Status};
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

/// In the environment of a server in the background: it says on its standard output that it serves.
const BACKGROUND: &str = "YADO_QEMU_NBD_BACKGROUND";
/// Most clients at a time.
const CLIENTS_MAX: u32 = 4096;
/// What it says.
const SERVES: &[u8] = b"+";

/// Serve a disk image to clients of the NBD protocol
#[derive(Debug, Parser)]
#[command(
    name = "qemu-nbd",
    version,
    about = "Serve a disk image to NBD clients (yado in place of qemu-nbd)"
)]
#[command(disable_version_flag = true)]
struct Arguments {
    /// Print the version
    #[arg(short = 'V', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
    /// Port to listen on
    #[arg(short, long, default_value_t = 10809)]
    port: u16,
    /// Address to listen at
    #[arg(short, long, default_value = "0.0.0.0", value_name = "ADDRESS")]
    bind: String,
    /// Unix socket to make
    #[arg(short = 'k', long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Clients at a time, more wait; 0: any number
    #[arg(short = 'e', long, value_name = "NUM", default_value_t = 1)]
    shared: u32,
    /// Do not end with the last client
    #[arg(short = 't', long)]
    persistent: bool,
    /// Say what happens
    #[arg(short, long)]
    verbose: bool,
    /// Name of the export
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    export_name: String,
    /// What it is, for people
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    description: String,
    /// Where in the image the export begins, in bytes
    #[arg(short, long, value_name = "OFFSET", default_value_t = 0)]
    offset: u64,
    /// Tell which image of a chain holds what (yado always does)
    #[arg(short = 'A', long)]
    allocation_depth: bool,
    /// tls-creds-x509,id=ID,dir=DIRECTORY,endpoint=server[,verify-peer=on|off]
    #[arg(long, value_name = "TYPE,id=ID,...")]
    object: Vec<String>,
    /// Encrypt with that object
    #[arg(long, value_name = "ID")]
    tls_creds: Option<String>,
    /// Go on in the background once clients can come
    #[arg(long)]
    fork: bool,
    /// Write the server's process id there
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,
    /// Format of the image
    #[arg(short = 'f', long, value_name = "FORMAT")]
    format: Option<String>,
    /// Let nobody write
    #[arg(short = 'r', long)]
    read_only: bool,
    /// Serve an internal snapshot
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    load_snapshot: Option<String>,
    /// The same as --cache=none
    #[arg(short = 'n', long, conflicts_with = "cache")]
    nocache: bool,
    /// What stands between writes and stable storage
    #[arg(long, value_name = "MODE", default_value = "writeback")]
    cache: CacheMode,
    /// How the host reads and writes: yado chooses for itself
    #[arg(long, value_name = "MODE", value_parser = ["native", "threads", "io_uring"])]
    aio: Option<String>,
    /// Whether clients can give space back
    #[arg(long, value_name = "MODE", default_value = "ignore", value_parser = ["ignore", "off", "unmap", "on"])]
    discard: String,
    /// What becomes of zeroes that are written
    #[arg(long, value_name = "MODE", default_value = "off")]
    detect_zeroes: DetectZeroes,
    /// The image
    file: PathBuf,
}

/// Whether yado was called by this name.
pub fn is_called(program: Option<&Path>) -> bool {
    program.and_then(Path::file_name).is_some_and(|name| name == "qemu-nbd")
}

/// Does what qemu-nbd does; answers the code to leave with.
pub fn main() -> u8 {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Printing fails only where nobody reads it.
            let _ = error.print();
            return u8::from(error.use_stderr());
        }
    };
    if let Err(error) = crate::signals::install() {
        eprintln!("qemu-nbd: cannot catch signals: {error}");
        return 1;
    }
    let done = if arguments.fork && std::env::var_os(BACKGROUND).is_none() {
        in_background()
    } else {
        if arguments.fork {
            // No terminal's hang-up ends it. It fails only for who leads a session already.
            let _ = rustix::process::setsid();
        }
        run(&arguments)
    };
    match done {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("qemu-nbd: {error:#}");
            1
        }
    }
}

/// Starts the same again in the background, and waits until it serves.
fn in_background() -> Result<()> {
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_default();
    let mut command = Command::new(std::env::current_exe().context("cannot find the own program")?);
    command.arg0(program).args(words).env(BACKGROUND, "1");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut said = Vec::new();
    if let Some(mut output) = child.stdout.take() {
        output.by_ref().take(1).read_to_end(&mut said)?;
    }
    if said == SERVES {
        return Ok(());
    }
    // It has said why on the standard error, which is the same.
    let code = child.wait()?.code().unwrap_or(1);
    std::process::exit(if code == 0 { 1 } else { code });
}

/// A file with this process's number; gone with the value.
struct PidFile(PathBuf);

impl PidFile {
    fn write(path: &Path) -> Result<Self> {
        std::fs::write(path, format!("{}\n", std::process::id()))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let listen = match &arguments.socket {
        Some(_) => Vec::new(),
        None => {
            let v6 = arguments.bind.contains(':');
            let host = if v6 { format!("[{}]", arguments.bind) } else { arguments.bind.clone() };
            vec![format!("{host}:{}", arguments.port)]
        }
    };
    let tls = tls(arguments)?;
    let image = Served {
        name: None,
        file: arguments.file.clone(),
        format: None,
        snapshot: None,
        read_only: arguments.read_only,
    };
    let serve = Serve {
        socket: arguments.socket.iter().cloned().collect(),
        listen,
        export: Some(arguments.export_name.clone()),
        description: arguments.description.clone(),
        format: arguments.format.clone(),
        read_only: arguments.read_only,
        snapshot: arguments.load_snapshot.as_deref().map(|text| snapshot(text).to_owned()),
        force_share: false,
        tls_certificates: tls.as_ref().map(|(directory, _)| directory.clone()),
        tls: TlsPolicy::Required,
        tls_verify_clients: tls.is_some_and(|(_, verify)| verify),
        cache: if arguments.nocache { CacheMode::None } else { arguments.cache },
        detect_zeroes: arguments.detect_zeroes,
        clients: if arguments.shared == 0 { CLIENTS_MAX } else { arguments.shared.min(CLIENTS_MAX) },
        once: !arguments.persistent,
        json: false,
        // In the background there is nobody to tell: what is said on the output is for who waits.
        quiet: !arguments.verbose || arguments.fork,
        images: vec![image],
    };
    let keeps_space = matches!(arguments.discard.as_str(), "ignore" | "off");
    let offset = arguments.offset;
    let dress = |disk: Arc<dyn Disk>| -> Result<Arc<dyn Disk>> {
        if offset > disk.capacity() {
            bail!("the offset {offset} is beyond the image's end");
        }
        Ok(if offset > 0 || keeps_space { Arc::new(Dressed { disk, offset, keeps_space }) } else { disk })
    };
    let mut pid_file = None;
    let ready = || -> Result<()> {
        pid_file = arguments.pid_file.as_deref().map(PidFile::write).transpose()?;
        if arguments.fork {
            let mut output = io::stdout();
            output.write_all(SERVES).and_then(|()| output.flush()).context("nobody waits for the server")?;
        }
        Ok(())
    };
    serve_with(&serve, dress, ready)
}

/// The name in `snapshot.name=NAME`, `snapshot.id=ID`, or the text itself.
fn snapshot(text: &str) -> &str {
    let named = text.split(',').find_map(|part| part.strip_prefix("snapshot.name="));
    let numbered = || text.split(',').find_map(|part| part.strip_prefix("snapshot.id="));
    named.or_else(numbered).unwrap_or(text)
}

/// The directory of certificates, and whether clients must show theirs.
fn tls(arguments: &Arguments) -> Result<Option<(PathBuf, bool)>> {
    let Some(wanted) = &arguments.tls_creds else { return Ok(None) };
    for object in &arguments.object {
        let mut parts = object.split(',');
        let kind = parts.next().unwrap_or_default();
        let parts: Vec<(&str, &str)> = parts.filter_map(|part| part.split_once('=')).collect();
        let part = |name: &str| parts.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
        if part("id") != Some(wanted) {
            continue;
        }
        if kind != "tls-creds-x509" {
            bail!("--object {kind}: only tls-creds-x509 is there");
        }
        let directory = part("dir").context("--object tls-creds-x509 lacks dir=")?;
        let verify = !matches!(part("verify-peer"), Some("off" | "no"));
        return Ok(Some((directory.into(), verify)));
    }
    bail!("there is no object {wanted:?} for --tls-creds")
}

/// A part of a disk, up to its end, or one that gives no space back.
struct Dressed {
    disk: Arc<dyn Disk>,
    offset: u64,
    keeps_space: bool,
}

impl Dressed {
    fn place(&self, offset: u64) -> u64 {
        offset.saturating_add(self.offset)
    }
}

impl Disk for Dressed {
    fn capacity(&self) -> u64 {
        self.disk.capacity().saturating_sub(self.offset)
    }
    fn read_only(&self) -> bool {
        self.disk.read_only()
    }
    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        self.disk.read(self.place(offset), buffers)
    }
    fn write(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        self.disk.write(self.place(offset), buffers)
    }
    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.keeps_space { Ok(()) } else { self.disk.discard(self.place(offset), len) }
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.disk.write_zeroes(self.place(offset), len, unmap && !self.keeps_space)
    }
    fn zero_quickly(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.disk.zero_quickly(self.place(offset), len, unmap && !self.keeps_space)
    }
    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        self.disk.block_status(self.place(offset), len)
    }
    fn resize(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn snapshot(&self, name: &str) -> io::Result<()> {
        self.disk.snapshot(name)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn its_arguments_are_understood() {
        Arguments::command().debug_assert();
        let line = "qemu-nbd -t -e 8 -f raw -k s --fork --pid-file=p --cache=none --discard=unmap -x n image";
        let arguments = Arguments::try_parse_from(line.split(' ')).unwrap();
        assert!(arguments.persistent && arguments.fork && arguments.cache == CacheMode::None);
        assert_eq!((arguments.shared, arguments.export_name.as_str()), (8, "n"));
        assert!(Arguments::try_parse_from(["qemu-nbd", "-c", "/dev/nbd0", "image"]).is_err());
        assert!(is_called(Some(Path::new("/usr/bin/qemu-nbd"))) && !is_called(Some(Path::new("yado"))));
    }

    #[test]
    fn snapshots_and_certificates_are_found() {
        assert_eq!(snapshot("snapshot.id=3,snapshot.name=monday"), "monday");
        assert_eq!((snapshot("snapshot.id=3"), snapshot("tuesday")), ("3", "tuesday"));
        let line = "qemu-nbd --object tls-creds-x509,id=t,dir=/d,endpoint=server --tls-creds t image";
        let arguments = Arguments::try_parse_from(line.split(' ')).unwrap();
        assert_eq!(tls(&arguments).unwrap(), Some(("/d".into(), true)));
        let line = "qemu-nbd --object secret,id=t,data=x --tls-creds t image";
        assert!(tls(&Arguments::try_parse_from(line.split(' ')).unwrap()).is_err());
    }

    #[test]
    fn a_part_of_a_disk_is_one_and_keeps_its_space() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [[1; 4096], [2; 4096]].concat()).unwrap();
        let disk: Arc<dyn Disk> = Arc::new(image::format::Raw::open(file.path(), false).unwrap());
        let part = Dressed { disk, offset: 4096, keeps_space: true };
        assert_eq!(part.capacity(), 4096);
        part.discard(0, 4096).unwrap();
        let mut bytes = [0; 4096];
        part.read(0, &image::ReadInto::new(&mut bytes)).unwrap();
        assert_eq!(bytes, [2; 4096]);
        part.write_zeroes(0, 512, true).unwrap();
        assert_eq!(part.block_status(0, 512).unwrap().content, image::Content::Data);
        assert_eq!(std::fs::read(file.path()).unwrap()[..4608], [[1; 4096].as_slice(), &[0; 512]].concat());
        assert!(part.read(1, &image::ReadInto::new(&mut bytes)).is_err());
    }
}
