//! `yado switch` and `yado net`: switches, each a process of its own, and what goes through them.
//!
//! A switch has a directory `switch/NAME` below the runtime directory, with its control socket and those of its ports. Who may enter
//! the directory may do everything to the switch: that is the user.

pub mod arguments;
mod cards;
mod report;

use crate::exit::with_code;
use crate::{registry, signals};
use anyhow::{Context, Result, bail, ensure};
use arguments::{Add, Capture, Create, Limit, Mirror, NetCommand, Set, SwitchCommand};
use net::switch::control::{self, PortKind, Request};
use net::switch::server::{Config, Server};
use net::switch::{GroupSpec, PortSpec};
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// What a switch's process says when it listens.
const READY: &str = "ready";
/// How long a capture waits for frames before it looks whether it shall end.
const PATIENCE: Duration = Duration::from_millis(100);

fn directory() -> Result<PathBuf> {
    Ok(registry::runtime_directory()?.join("switch"))
}

/// The control socket of a switch.
pub fn control_socket(name: &str) -> Result<PathBuf> {
    registry::check_name(name).map_err(|_| with_code(2, format!("{name:?} cannot be a switch's name")))?;
    Ok(directory()?.join(name).join("control.sock"))
}

fn ask(name: &str, request: &Request) -> Result<Value> {
    Ok(control::ask(&running(name)?, request)?)
}

/// The control socket of a switch that was created.
pub fn running(name: &str) -> Result<PathBuf> {
    let path = control_socket(name)?;
    ensure!(path.exists(), "there is no switch {name}: `yado switch create {name}` makes it");
    Ok(path)
}

/// `yado switch`
pub fn switch(command: SwitchCommand) -> Result<()> {
    match command {
        SwitchCommand::Create(options) if options.foreground => serve(&options),
        SwitchCommand::Create(options) => create(&options),
        SwitchCommand::Serve(options) => serve(&options),
        SwitchCommand::Ls(options) => report::list(&all()?, options.json),
        SwitchCommand::Ports(options) => report::ports(&ask(&options.name, &Request::Inspect)?, options.json),
        SwitchCommand::Addresses(options) => {
            report::addresses(&ask(&options.name, &Request::Addresses)?, options.json)
        }
        SwitchCommand::Multicast(options) => {
            report::multicast(&ask(&options.name, &Request::Multicast)?, options.json)
        }
        SwitchCommand::Stats(options) => {
            for _ in 0..options.count {
                let look = || Ok(vec![(options.name.clone(), ask(&options.name, &Request::Inspect)?)]);
                let rates = report::rates(look, "switch", seconds(options.interval)?)?;
                report::print_rates(&rates, options.json)?;
            }
            Ok(())
        }
        SwitchCommand::Add(options) => add(&options),
        SwitchCommand::Set(options) => set(&options),
        SwitchCommand::Limit(options) => limit(&options),
        SwitchCommand::Remove(port) => ask(&port.name, &Request::RemovePort { name: port.port }).map(drop),
        SwitchCommand::Mirror(options) => mirror(options),
        SwitchCommand::Rm(options) => options.names.iter().try_for_each(|name| remove(name)),
    }
}

/// `yado net`
pub fn net(command: NetCommand) -> Result<()> {
    match command {
        NetCommand::Top(options) => {
            let interval = seconds(options.interval)?;
            // Both for the same while.
            let guests = std::thread::spawn(move || report::rates(|| Ok(cards::all()), "guest", interval));
            let mut rates = report::rates(all, "switch", interval)?;
            rates.extend(guests.join().map_err(|_| anyhow::anyhow!("a look at the guests failed"))??);
            rates.sort_by(|a, b| b.bits().total_cmp(&a.bits()));
            report::print_rates(&rates, options.json)
        }
        NetCommand::Capture(options) => capture(options),
    }
}

fn seconds(number: f64) -> Result<Duration> {
    let sound = (0.01..=3600.0).contains(&number);
    ensure!(sound, with_code(2, format!("--interval {number}: seconds from 0.01 to 3600")));
    Ok(Duration::from_secs_f64(number))
}

/// All switches that answer, with their trees. What dead ones have left is removed on the way.
fn all() -> Result<Vec<(String, Value)>> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(directory()?) else { return Ok(found) };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        match control::ask(&entry.path().join("control.sock"), &Request::Inspect) {
            Ok(tree) => found.push((name, tree)),
            Err(control::Error::Connect { source, .. })
                if source.kind() == std::io::ErrorKind::ConnectionRefused =>
            {
                // Unless it is only about to listen.
                if let Some(_lock) = lock(&entry.path()) {
                    forget(&name)?;
                }
            }
            Err(_) => {}
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// Whoever is, or wants to be, the switch of this directory has it locked; `None`: somebody has.
fn lock(place: &Path) -> Option<fs::File> {
    let directory = fs::File::open(place).ok()?;
    flock(&directory, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(directory)
}

/// Removes the directory of a switch that does not run.
fn forget(name: &str) -> Result<()> {
    let place = directory()?.join(name);
    match fs::remove_dir_all(&place) {
        // Somebody else has found that it is over.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        done => done.with_context(|| format!("cannot remove {}", place.display()))?,
    }
    // The last one leaves nothing behind.
    let _ = fs::remove_dir(directory()?);
    Ok(())
}

fn create(options: &Create) -> Result<()> {
    let path = control_socket(&options.name)?;
    ensure!(
        UnixStream::connect(&path).is_err(),
        "the switch {name} runs already: `yado switch ports {name}` shows it",
        name = options.name
    );
    let program = std::env::current_exe().context("cannot find yado's own program file")?;
    let mut command = std::process::Command::new(program);
    command
        .args(["switch", "serve", &options.name])
        .args(["--poll", &options.poll.to_string(), "--addresses", &options.addresses.to_string()])
        .args(["--ageing", &options.ageing.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = command.spawn().context("cannot start a process for the switch")?;
    let mut said = String::new();
    if let Some(mut out) = child.stdout.take() {
        let mut byte = [0];
        while !said.ends_with('\n') && out.read(&mut byte).is_ok_and(|count| count == 1) {
            said.push(char::from(byte[0]));
        }
    }
    if said.trim_end() == READY {
        println!("{}", options.name);
        return Ok(());
    }
    let mut why = String::new();
    if let Some(mut error) = child.stderr.take() {
        let _ = error.read_to_string(&mut why);
    }
    bail!("the switch did not start: {}", why.trim_end().trim_start_matches("yado: "))
}

/// The switch's process.
fn serve(options: &Create) -> Result<()> {
    let control = control_socket(&options.name)?;
    let place = control.parent().context("a switch has a directory")?.to_path_buf();
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    let _lock = lock(&place).with_context(|| format!("the switch {} runs already", options.name))?;
    let config = Config {
        control: control.clone(),
        ports: place.clone(),
        spin: Duration::from_micros(options.poll),
        addresses_max: options.addresses,
        ageing_seconds: options.ageing,
    };
    let server = Server::new(config)?;
    signals::install()?;
    // A signal is a question like any other.
    let stop = std::thread::Builder::new().name("signals".into());
    stop.spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(200));
            if signals::cancelled() {
                let _ = control::ask(&control, &Request::Stop);
            }
        }
    })?;
    let log = fs::File::create(place.join("switch.log")).context("cannot write the switch's log")?;
    if options.foreground {
        println!("{READY}");
    } else {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{READY}")?;
        out.flush()?;
        let nowhere = fs::File::options().write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdout(&nowhere)?;
        rustix::stdio::dup2_stderr(&nowhere)?;
    }
    let mut log = std::io::LineWriter::new(log);
    let mut lines = 0u32;
    server.run(&mut |line| {
        // A port that breaks its rings again and again fills nothing.
        lines = lines.saturating_add(1);
        if lines < 10_000 {
            let _ = writeln!(log, "{line}");
        }
    })?;
    forget(&options.name)
}

fn remove(name: &str) -> Result<()> {
    let path = running(name)?;
    match control::ask(&path, &Request::Stop) {
        Ok(_) => {}
        Err(control::Error::Connect { .. }) => {
            let _lock = path
                .parent()
                .and_then(lock)
                .with_context(|| format!("the switch {name} is there, but does not listen yet: try again"))?;
            return forget(name);
        }
        Err(error) => return Err(error.into()),
    }
    let until = Instant::now() + Duration::from_secs(5);
    while path.parent().is_some_and(Path::exists) {
        ensure!(Instant::now() < until, "the switch {name} does not stop");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn usage(why: String) -> anyhow::Error {
    with_code(2, why)
}

fn add(options: &Add) -> Result<()> {
    let mut spec =
        PortSpec { trusted: options.tap.is_some() || options.vxlan.is_some(), ..PortSpec::default() };
    spec.apply_all(&options.options).map_err(usage)?;
    let kind = match (&options.tap, &options.vxlan) {
        (Some(tap), _) => PortKind::Tap(tap.clone()),
        (None, Some(tunnel)) => PortKind::Vxlan(tunnel.clone()),
        (None, None) => PortKind::Socket,
    };
    let answer = ask(&options.name, &Request::AddPort { name: options.port.clone(), spec, kind })?;
    if let Some(path) = answer["socket"].as_str() {
        println!("{path}");
    }
    Ok(())
}

fn set(options: &Set) -> Result<()> {
    let path = running(&options.name)?;
    let tree = control::ask(&path, &Request::Inspect)?;
    let ports = tree["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
    let port = ports.iter().find(|port| port["name"] == options.port.as_str());
    let port = port.with_context(|| format!("the switch {} has no port {}", options.name, options.port))?;
    let mut spec: PortSpec = serde_json::from_value(port["spec"].clone())?;
    options.options.iter().try_for_each(|text| spec.apply_all(text)).map_err(usage)?;
    control::ask(&path, &Request::SetPort { name: options.port.clone(), spec })?;
    Ok(())
}

fn limit(options: &Limit) -> Result<()> {
    let path = running(&options.name)?;
    if let Some(name) = options.group.clone().filter(|_| options.remove) {
        control::ask(&path, &Request::RemoveGroup { name })?;
        return Ok(());
    }
    let tree = control::ask(&path, &Request::Inspect)?;
    if options.options.is_empty() {
        return report::limits(&tree, options.group.as_deref(), options.json);
    }
    let groups = tree["groups"].as_array().map(Vec::as_slice).unwrap_or_default();
    let now = match options.group.as_deref() {
        None => Some(&tree["limits"]),
        Some(name) => groups.iter().find(|group| group["name"] == name).map(|group| &group["spec"]),
    };
    let mut spec: GroupSpec = now.cloned().map(serde_json::from_value).transpose()?.unwrap_or_default();
    options.options.iter().try_for_each(|text| spec.apply_all(text)).map_err(usage)?;
    control::ask(&path, &Request::SetGroup { name: options.group.clone(), spec })?;
    Ok(())
}

fn mirror(options: Mirror) -> Result<()> {
    let request = Request::Capture { ports: options.ports, snap: options.snap };
    let (_, stream) = control::open(&running(&options.name)?, &request)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    copy(stream, &options.file, options.seconds)
}

fn capture(options: Capture) -> Result<()> {
    let switches = all()?;
    let (switch, ports) = match options.name.split_once(':') {
        Some((switch, port)) => (switch.to_owned(), vec![port.to_owned()]),
        None => {
            let own = |tree: &Value| -> Vec<String> {
                let ports = tree["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
                let names = ports.iter().filter_map(|port| port["name"].as_str());
                names.filter(|name| is_card_of(name, &options.name)).map(str::to_owned).collect()
            };
            let mut found = switches.iter().map(|(name, tree)| (name.clone(), own(tree)));
            match found.find(|(_, ports)| !ports.is_empty()) {
                Some(found) => found,
                None => {
                    let source = cards::capture(&options.name, options.snap)?;
                    source.set_patience(PATIENCE)?;
                    return copy(source, &options.file, options.seconds);
                }
            }
        }
    };
    let request = Request::Capture { ports, snap: options.snap };
    let (_, stream) = control::open(&running(&switch)?, &request)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    copy(stream, &options.file, options.seconds)
}

/// Whether a port is named for a card of a guest's: `web` for the first, `web.1` for the second.
fn is_card_of(port: &str, guest: &str) -> bool {
    let number = |rest: &str| rest.strip_prefix('.').is_some_and(|number| number.parse::<u16>().is_ok());
    port.strip_prefix(guest).is_some_and(|rest| rest.is_empty() || number(rest))
}

/// Copies until there is no more, the time is over, or the user interrupts.
fn copy(mut stream: impl Read, file: &Path, seconds: Option<u64>) -> Result<()> {
    signals::install()?;
    let mut out: Box<dyn Write> = if file.as_os_str() == "-" {
        Box::new(std::io::stdout())
    } else {
        Box::new(fs::File::create(file).with_context(|| format!("cannot write {}", file.display()))?)
    };
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let (mut bytes, mut waiting) = (vec![0; 1 << 18], Vec::new());
    while !signals::cancelled() && until.is_none_or(|until| Instant::now() < until) {
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => {
                waiting.extend_from_slice(bytes.get(..count).unwrap_or_default());
                let whole = whole_blocks(&waiting);
                out.write_all(waiting.get(..whole).unwrap_or_default())?;
                waiting.drain(..whole);
                out.flush()?;
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error).context("the capture was ended from the other side"),
        }
    }
    Ok(())
}

/// Bytes of a pcapng file up to the end of its last whole block, so that a file never ends within one.
fn whole_blocks(bytes: &[u8]) -> usize {
    let mut end = 0;
    let length = |at: usize| {
        let length = bytes.get(at + 4..)?.first_chunk::<4>()?;
        usize::try_from(u32::from_le_bytes(*length)).ok().filter(|length| *length >= 12)
    };
    while let Some(next) = length(end).map(|length| end + length).filter(|next| *next <= bytes.len()) {
        end = next;
    }
    end
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn captures_end_between_frames() {
        let block =
            |length: u32, fill: usize| [&[6, 0, 0, 0][..], &length.to_le_bytes(), &vec![7; fill]].concat();
        let two = [block(20, 12), block(12, 4)].concat();
        assert_eq!((whole_blocks(&two), whole_blocks(&two[..31]), whole_blocks(&two[..7])), (32, 20, 0));
        assert_eq!(whole_blocks(&block(3, 40)), 0, "a length that cannot be ends the file");
    }

    #[test]
    fn a_guests_cards_have_its_name() {
        assert!(is_card_of("web", "web") && is_card_of("web.1", "web") && is_card_of("a.b", "a.b"));
        assert!(!is_card_of("web.x", "web") && !is_card_of("webs", "web") && !is_card_of("a.b", "a"));
    }

    #[test]
    fn a_directory_is_one_switchs() {
        let place = std::env::temp_dir().join(format!("yado-switch-lock-{}", std::process::id()));
        fs::create_dir_all(&place).unwrap();
        let first = lock(&place);
        assert!(first.is_some() && lock(&place).is_none());
        drop(first);
        assert!(lock(&place).is_some());
        fs::remove_dir(&place).unwrap();
        assert!(lock(&place).is_none());
    }
}
