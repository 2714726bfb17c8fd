//! `yado run`: from a word to a running guest, and its end.

mod background;
mod confine;
mod network;
mod source;

pub use background::is_background;

use crate::arguments::{DiskBus, Run, Switched};
use crate::exit::{self, with_code};
use crate::host_share::Share;
use crate::progress::Phases;
use crate::registry::{self, Place, Record};
use crate::{client, engine, guests, host_share, provision, signals, terminal};
use anyhow::Context;
use guest::Poweroff;
use image::format::Format;
use image::storage::CacheMode;
use machine::agent::Agent;
use machine::console::Console;
use machine::control::{Listener, Server};
use machine::{DiskConfig, DiskInterface, EngineKind, Machine, MachineConfig, Notice, Outcome};
use resources::{Limits, cgroup};
use source::{Root, Source};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a guest may take to power off when its console is left or its command has ended.
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(30);
/// How often waiting looks for the user's Ctrl-C.
const TURN: Duration = Duration::from_millis(50);
/// Lines of the console that an error shows.
const CONSOLE_LINES: usize = 20;

/// Runs a guest; answers the exit code.
pub fn run(options: Run) -> anyhow::Result<u8> {
    source::check_memory(options.memory.size)?;
    provision::numa(&options.numa).map_err(|why| with_code(2, why))?;
    if options.detach && !background::is_background() {
        println!("{}", background::start()?);
        return Ok(0);
    }
    signals::install()?;
    let mut phases = Phases::new(options.quiet);
    let place = match &options.name {
        Some(name) => Place::take(name)?,
        None => Place::take_new(source::stem(&options))?,
    };
    let ephemeral = options.name.is_none();
    let had_record = place.record()?;
    if let Some(record) = &had_record {
        cgroup::remove(&record.cgroups, Duration::ZERO);
    }
    let had_disk = place.disk().exists();
    let result = run_at(&options, &place, &mut phases);
    // A guest that never started leaves nothing behind.
    let begun = had_record.is_some() || had_disk || place.directory.join("guest.json").exists();
    if ephemeral || (result.is_err() && !begun) {
        let _ = place.remove();
    } else {
        let _ = place.leave();
    }
    result
}

fn run_at(options: &Run, place: &Place, phases: &mut Phases) -> anyhow::Result<u8> {
    let choice = engine::choose(options.engine)?;
    let source = source::find(options, place, phases)?;
    phases.say(&format!(
        "machine: {}, {}, engine {} ({})",
        count(options.cpus, "CPU"),
        options.memory.size,
        choice.name(),
        choice.why
    ));
    if source.direct {
        phases.say(&format!("kernel: {}, command line {:?}", source.label, source.boot.cmdline));
    }
    place.set_record(&Record {
        name: place.name.clone(),
        source: source.label.clone(),
        ephemeral: options.name.is_none(),
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
        pid: std::process::id(),
        cpus: options.cpus,
        memory: options.memory.size.0,
        engine: choice.name().to_owned(),
        cgroups: Vec::new(),
        boot: source.keeps.then(|| stored_boot(&source, options)),
    })?;
    phases.finish();
    let parting = background::Parting::new()?;
    let guest = Guest::start(options, place, &source, choice.kind, phases)?;
    if let Some(parting) = parting {
        // Who started this has been interrupted.
        if let Err(error) = parting.ready(&place.name) {
            guest.power_off();
            guest.finish();
            return Err(error);
        }
    }
    let code = guest.attend(options, phases);
    guest.finish();
    code
}

fn count(number: u32, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// The way to boot as it was before this run's own `--cmdline`.
fn stored_boot(source: &Source, options: &Run) -> registry::Boot {
    let mut boot = source.boot.clone();
    if let Some(more) = &options.cmdline
        && let Some(stem) = boot.cmdline.strip_suffix(more.as_str())
    {
        boot.cmdline = stem.trim_end().to_owned();
    }
    boot
}

/// A running guest in this process.
struct Guest {
    machine: Arc<Machine>,
    console: Console,
    agent: Option<Agent>,
    name: String,
    keeps: bool,
    server: Option<Server>,
    _share: Share,
}

impl Guest {
    fn start(
        options: &Run,
        place: &Place,
        source: &Source,
        engine: EngineKind,
        phases: &mut Phases,
    ) -> anyhow::Result<Self> {
        let mut config = MachineConfig { engine, ..configuration(options, place, source)? };
        // Before there is anything to be counted.
        let share = Share::take(place, &limits(options, &config), options.cgroup.as_deref())?;
        config.scheduling = host_share::scheduling(&options.pin, &options.priority).prepare(config.cpus)?;
        config.groups.clone_from(&share.groups);
        let plan = confine::plan(&config);
        let machine = Arc::new(machine(config, phases).map_err(|error| {
            let of_kvm = engine == EngineKind::Kvm && matches!(error, machine::Error::Engine(_));
            let error = anyhow::Error::from(error);
            if of_kvm { error.context("KVM does not run this guest; --engine soft may") } else { error }
        })?);
        let path = place.directory.join("console.log");
        let log = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let socket = place.socket()?;
        let listener =
            Listener::new(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
        if options.sandbox == Switched::On {
            confine::put_on(plan, place, options.name.is_none())?;
        }
        let console = Console::new(machine.serial(), Some(log))?;
        let agent = match machine.port(guest::PORT_NAME) {
            Some(port) => Some(Agent::new(port)?),
            None => None,
        };
        let (printed, commands, name) = (console.clone(), agent.clone(), place.name.clone());
        machine.on_notice(move |notice| match notice {
            Notice::Restarted { starts } => {
                printed.note(&format!("the guest restarts: start {starts}"));
                if let Some(agent) = &commands {
                    agent.machine_reset();
                }
            }
            Notice::DiskFull { path, waits } => {
                let what = if waits { "the guest stands still" } else { "what the guest writes fails" };
                say(&printed, &format!("no space is left at {}: {what} until some is freed", path.display()));
            }
            Notice::DiskFails { path } => say(
                &printed,
                &format!(
                    "{} cannot be read or written: the guest stands still; `yado resume {name}` tries again",
                    path.display()
                ),
            ),
            Notice::DiskGoesOn { path } => {
                say(&printed, &format!("{} can be used again: the guest goes on", path.display()));
            }
            Notice::NetworkLost { card, why } => {
                say(&printed, &format!("network card {card} is cut off: {why}"));
            }
            Notice::NetworkBack { card } => say(&printed, &format!("network card {card} is connected again")),
        });
        let server = Server::new(listener, machine.clone(), console.clone(), agent.clone())?;
        machine.start()?;
        // A machine's end is seen by consoles and commands only once somebody has waited for it.
        let ends = machine.clone();
        std::thread::Builder::new().name("end".into()).spawn(move || ends.wait())?;
        Ok(Self {
            machine,
            console,
            agent,
            name: place.name.clone(),
            keeps: source.keeps,
            server: Some(server),
            _share: share,
        })
    }

    /// Stays with the guest until it, or what the user wants of it, has ended.
    fn attend(&self, options: &Run, phases: &mut Phases) -> anyhow::Result<u8> {
        if !options.argv.is_empty() {
            return self.command(options, phases);
        }
        if background::is_background() {
            return self.outcome_code(self.wait());
        }
        if terminal::is_interactive() {
            phases.say(&format!("console of {}; Ctrl-] leaves and powers off", self.name));
        }
        phases.finish();
        std::thread::scope(|scope| {
            // Ctrl-C where no terminal makes it a byte for the guest.
            let end = scope.spawn(|| self.wait());
            let console = self.connect().and_then(client::console);
            let left = console.inspect_err(|_| self.power_off())?;
            if left == client::ConsoleEnd::Left && self.machine.outcome().is_none() {
                eprintln!("\nyado: powering off");
                self.power_off();
                return Ok(0);
            }
            self.outcome_code(end.join().unwrap_or(Outcome::Stopped))
        })
    }

    /// A connection to the guest of this process itself, which may reach no socket by its path.
    fn connect(&self) -> anyhow::Result<UnixStream> {
        let server = self.server.as_ref().context("the guest is off")?;
        Ok(server.connect()?)
    }

    /// Waits for the end, or for Ctrl-C.
    fn wait(&self) -> Outcome {
        loop {
            if let Some(outcome) = self.machine.wait_timeout(TURN * 10) {
                return outcome;
            }
            if signals::cancelled() {
                eprintln!("yado: asking the guest to power off; Ctrl-C again stops it at once");
                self.power_off();
                return Outcome::Stopped;
            }
        }
    }

    fn command(&self, options: &Run, phases: &mut Phases) -> anyhow::Result<u8> {
        phases.begin("booting", None);
        self.wait_for_agent(Duration::from_secs(options.boot_timeout))?;
        phases.finish();
        let wait = Duration::from_secs(5);
        let tty = (options.tty, options.no_tty);
        let request = guests::exec_request(
            options.argv.clone(),
            &options.env,
            &options.workdir,
            &options.user,
            tty,
            wait,
        )?;
        let starts = self.machine.starts();
        let result = self.connect().and_then(|stream| client::exec(stream, request));
        let lost = result.as_ref().is_err_and(|error| exit::code_of(error) == exit::YADO_FAILED);
        match (&result, self.machine.wait_timeout(Duration::ZERO)) {
            // The guest went down under the command: how, says more than that the command was lost.
            (Err(_), Some(outcome)) if lost => match self.outcome_code(outcome)? {
                0 => Err(with_code(exit::YADO_FAILED, "the guest powered off before the command had ended")),
                code => Ok(code),
            },
            (_, Some(_)) => result,
            (_, None) => {
                let restarted = lost && self.machine.starts() != starts;
                self.end_after_command();
                if restarted {
                    let why = "the guest restarted before the command had ended";
                    return Err(with_code(exit::YADO_FAILED, why));
                }
                result
            }
        }
    }

    fn wait_for_agent(&self, timeout: Duration) -> anyhow::Result<()> {
        let agent = self
            .agent
            .as_ref()
            .context("this guest has no agent: leave out the command and use the console")?;
        let begin = Instant::now();
        while !agent.wait_ready(TURN) {
            if signals::cancelled() {
                return Err(with_code(signals::cancelled_code(), "cancelled while the guest booted"));
            }
            if let Some(outcome) = self.machine.outcome() {
                let code = self.outcome_code(outcome)?;
                return Err(with_code(code.max(1), "the guest powered off before it could run the command"));
            }
            if let Some(version) = agent.incompatible() {
                anyhow::bail!(
                    "the agent in the guest speaks version {version} of its protocol, this yado another one"
                );
            }
            if begin.elapsed() > timeout {
                self.show_console();
                anyhow::bail!(
                    "the guest did not take commands within {} s: the last lines of its console are above; \
                     a longer --boot-timeout may help",
                    timeout.as_secs()
                );
            }
        }
        Ok(())
    }

    /// The command has ended and with it the guest's purpose.
    fn end_after_command(&self) {
        if self.keeps {
            self.power_off();
        } else {
            // Nothing of it is kept, so nothing has to be put in order.
            self.machine.stop();
        }
    }

    /// Asks the guest to power off, and insists in the end.
    fn power_off(&self) {
        self.machine.expect_off();
        // One that is paused hears nothing.
        self.machine.resume();
        let ask = || {
            let asked = self.agent.as_ref().is_some_and(|agent| agent.poweroff(Poweroff::Orderly).is_ok());
            if !asked {
                self.machine.power_button();
            }
        };
        ask();
        let mut again = Instant::now() + guests::PRESS_PERIOD;
        let until = Instant::now() + POWER_OFF_TIMEOUT;
        signals::CANCELLED.store(false, std::sync::atomic::Ordering::Release);
        while self.machine.wait_timeout(TURN).is_none() {
            if Instant::now() > until || signals::cancelled() {
                let why = if signals::cancelled() { "" } else { "the guest does not power off; " };
                eprintln!("yado: {why}stopping it by force");
                self.machine.stop();
                return;
            }
            // A guest that still boots may have missed it.
            if Instant::now() > again {
                again += guests::PRESS_PERIOD;
                ask();
            }
        }
    }

    fn show_console(&self) {
        for line in self.console.last_lines(CONSOLE_LINES) {
            eprintln!("  | {line}");
        }
    }

    /// What an end means for yado's own exit.
    fn outcome_code(&self, outcome: Outcome) -> anyhow::Result<u8> {
        match outcome {
            Outcome::PoweredOff | Outcome::Reset | Outcome::Stopped => Ok(0),
            Outcome::NotRestarted(why) => {
                Err(with_code(exit::YADO_FAILED, format!("the guest cannot be started again: {why}")))
            }
            Outcome::DebugExit(code) => Ok(code),
            Outcome::GuestPanic => {
                self.show_console();
                Err(with_code(
                    exit::GUEST_PANICKED,
                    "the guest panicked: the last lines of its console are above",
                ))
            }
            Outcome::Crashed(crash) => {
                self.show_console();
                let whose = if crash.guest { "the guest crashed" } else { "the CPU engine cannot go on" };
                Err(with_code(exit::GUEST_CRASHED, format!("{whose}: {crash}")))
            }
        }
    }

    fn finish(mut self) {
        self.machine.stop();
        self.machine.wait();
        self.server.take();
    }
}

/// Makes the machine; shows how far the host is with its RAM, if all is to be there.
fn machine(config: MachineConfig, phases: &mut Phases) -> Result<Machine, machine::Error> {
    if config.memory_policy.populate.is_some() {
        phases.begin("finding memory", Some(config.memory));
    }
    let mut before = 0;
    let made = Machine::prepared(config, |done, _| {
        phases.advance(done - before);
        before = done;
    });
    phases.finish();
    made
}

/// What is asked for, of the disks that the images are on.
fn limits(options: &Run, config: &MachineConfig) -> Limits {
    let mut files: Vec<_> = config.disks.iter().map(|disk| disk.path.clone()).collect();
    files.extend(config.disks.iter().filter_map(|disk| disk.overlay.clone()));
    files.retain(|file| file.exists());
    Limits { files, ..host_share::limits(&options.limit) }
}

/// Tells the user and the console's log.
fn say(console: &Console, what: &str) {
    console.note(what);
    eprintln!("yado: {what}");
}

/// The format of a disk: what was said, else raw, but only if the file looks like nothing else. A guest that makes its raw
/// disk look like another format must not get what a header could name.
fn format_of(file: &Path, said: Option<Format>) -> anyhow::Result<Format> {
    if let Some(format) = said {
        return Ok(format);
    }
    let storage = image::storage::open(file, true, true, CacheMode::default())?;
    match image::format::probe(storage.as_ref()) {
        Ok(Format::Raw) => Ok(Format::Raw),
        Ok(other) => Err(with_code(
            2,
            format!(
                "{file} looks like a {other} image: say --disk {file},format={other}, or format=raw if it is none",
                file = file.display()
            ),
        )),
        Err(error) => Err(error).with_context(|| format!("cannot use {}", file.display())),
    }
}

/// An initial RAM disk that mounts the first of several NVMe disks: the kernel alone numbers them as it happens to find them.
fn chooser(directory: &Path) -> anyhow::Result<PathBuf> {
    let path = directory.join("initrd");
    std::fs::write(&path, debian::initramfs::bare(guest::AGENT))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn configuration(options: &Run, place: &Place, source: &Source) -> anyhow::Result<MachineConfig> {
    let mut config = MachineConfig::new(&source.boot.kernel);
    config.cpus = options.cpus;
    config.memory = options.memory.size.0;
    config.memory_policy = options.memory.policy;
    config.numa = provision::numa(&options.numa).map_err(|why| with_code(2, why))?;
    config.cpu_model.clone_from(&options.cpu);
    config.initrd.clone_from(&source.boot.initrd);
    config.command_line.clone_from(&source.boot.cmdline);
    config.test_devices = options.test_devices;
    config.restart = !options.no_reboot;
    let root = |path: &Path, overlay| DiskConfig {
        interface: DiskInterface::Nvme,
        overlay,
        ..DiskConfig::raw(path)
    };
    match &source.root {
        Root::None => {}
        Root::Disposable(path) => config.disks.push(root(path, Some(place.directory.clone()))),
        // A kept guest's own disk is raw, whatever the guest has written there.
        Root::Own(path) if source.direct => {
            config.disks.push(DiskConfig { format: format_of(path, None)?, ..root(path, None) });
        }
        Root::Own(path) => config.disks.push(root(path, None)),
    }
    for disk in &options.disk {
        let interface = match disk.bus {
            DiskBus::Nvme => DiskInterface::Nvme,
            DiskBus::Virtio => DiskInterface::Virtio,
        };
        config.disks.push(DiskConfig {
            format: format_of(&disk.file, disk.format)?,
            path: disk.file.clone(),
            read_only: disk.read_only,
            cache: disk.cache,
            detect_zeroes: disk.detect_zeroes,
            write_error: disk.write_error,
            read_error: disk.read_error,
            interface,
            overlay: None,
        });
    }
    let nvme = config.disks.iter().filter(|disk| disk.interface == DiskInterface::Nvme).count();
    if nvme > 1 && source.root != Root::None && config.initrd.is_none() {
        config.initrd = Some(chooser(&place.directory)?);
    }
    if source.agent {
        config.ports = vec![guest::PORT_NAME.to_owned()];
    }
    config.networks = network::cards(options, &place.name)?;
    if source.agent && !source.direct {
        config.command_line.push_str(&network::kernel_words(&config.networks));
    }
    Ok(config)
}
