//! Boots a kernel with its serial port on the terminal: the tool for those who work on engines and devices.
//!
//!     boot --kernel K [--initrd I] [--cmdline S] [--disk F]... [--memory 512M] [--cpus N] [--test-devices]
//!          [--log-exits] [--single-step] [--limit SECONDS] [--inspect]
//!          [--verify INSTRUCTIONS] [--clock-divisor N]
//!
//! With --verify both tiers of the software engine run in lock-step until so many instructions agreed; a guest that is a
//! hundred times slower needs clocks that are, or it finds that everything takes too long.
//!
//! Leaves with 0 after a power-off, 3 after a reset, 4 after a guest panic, 5 after a crash, 6 when the limit is
//! over, and with the guest's own code after a debug exit.
#![forbid(unsafe_code)]

use engine_soft::verify::VERIFIED;
use machine::{DiskConfig, DiskInterface, Machine, MachineConfig, Outcome};
use std::io::{Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

struct Options {
    config: MachineConfig,
    limit: Option<Duration>,
    inspect: bool,
    verify: Option<u64>,
}

fn size(text: &str) -> Option<u64> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_shl(shift)
}

fn options() -> Result<Options, String> {
    let mut config = MachineConfig::new("");
    let (mut limit, mut inspect, mut verify) = (None, false, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--test-devices" => config.test_devices = true,
            "--log-exits" => config.log_exits = true,
            "--single-step" => config.translate = false,
            "--inspect" => inspect = true,
            _ => {
                let value = arguments.next().ok_or(format!("{name} needs a value"))?;
                let wrong = format!("{name}: what is {value:?}?");
                match name.as_str() {
                    "--kernel" => config.kernel = value.into(),
                    "--initrd" => config.initrd = Some(value.into()),
                    "--cmdline" => config.command_line = value,
                    "--memory" => config.memory = size(&value).ok_or(wrong)?,
                    "--cpus" => config.cpus = value.parse().map_err(|_| wrong)?,
                    "--cpu" => config.cpu_model = Some(value),
                    "--port" => config.ports.push(value),
                    "--verify" => {
                        config.verify = true;
                        verify = Some(value.parse().map_err(|_| wrong)?);
                    }
                    "--clock-divisor" => config.clock_divisor = value.parse().map_err(|_| wrong)?,
                    "--limit" => limit = Some(Duration::from_secs(value.parse().map_err(|_| wrong)?)),
                    "--disk" | "--virtio-disk" => config.disks.push(DiskConfig {
                        interface: if name == "--disk" { DiskInterface::Nvme } else { DiskInterface::Virtio },
                        ..DiskConfig::raw(value)
                    }),
                    _ => return Err(format!("unknown option {name}")),
                }
            }
        }
    }
    Ok(Options { config, limit, inspect, verify })
}

fn main() -> ExitCode {
    match options().and_then(run) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::from(125)
        }
    }
}

/// Until the machine ends, or enough instructions were compared.
fn wait_verified(machine: &Machine, wanted: u64, limit: Option<Duration>) -> Option<Outcome> {
    let began = Instant::now();
    loop {
        let outcome = machine.wait_timeout(Duration::from_secs(2));
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let instructions = count(&VERIFIED.instructions);
        eprintln!(
            "boot: verified {instructions} instructions in {} blocks, {} blocks went on unseen, {:.0} s",
            count(&VERIFIED.blocks),
            count(&VERIFIED.unseen),
            began.elapsed().as_secs_f64()
        );
        if outcome.is_some() || instructions >= wanted || limit.is_some_and(|limit| began.elapsed() > limit) {
            return outcome;
        }
    }
}

fn run(options: Options) -> Result<u8, String> {
    let made = Instant::now();
    let machine = Arc::new(Machine::new(options.config).map_err(|error| error.to_string())?);
    let began = Instant::now();
    machine.start().map_err(|error| error.to_string())?;
    let (output, input) = (machine.serial(), machine.serial());
    let printer = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let open = output.receive(&mut bytes, Duration::from_secs(60));
            let mut stdout = std::io::stdout().lock();
            let _ = stdout.write_all(&bytes).and_then(|()| stdout.flush());
            if !open {
                return;
            }
        }
    });
    // Reading the terminal cannot be interrupted; the process ends without this thread.
    std::thread::spawn(move || {
        let mut bytes = [0; 256];
        while let Ok(len @ 1..) = std::io::stdin().read(&mut bytes) {
            let mut rest = bytes.get(..len).unwrap_or_default();
            while !rest.is_empty() {
                let sent = input.send(rest, Duration::from_secs(1));
                rest = rest.get(sent..).unwrap_or_default();
            }
        }
    });
    let outcome = match (options.limit, options.verify) {
        (limit, Some(wanted)) => wait_verified(&machine, wanted, limit),
        (None, None) => Some(machine.wait()),
        (Some(limit), None) => machine.wait_timeout(limit),
    };
    if options.inspect {
        eprintln!("{:#}", machine.inspect());
    }
    if outcome.is_none() {
        machine.stop();
        machine.wait();
    }
    let _ = printer.join();
    eprintln!(
        "\nboot: loaded in {:.3} s, ran {:.3} s",
        began.duration_since(made).as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    Ok(match outcome {
        None => {
            eprintln!("boot: stopped at the limit");
            6
        }
        Some(Outcome::Crashed(crash)) => {
            eprintln!("{crash}");
            5
        }
        Some(outcome) => {
            eprintln!("boot: {outcome:?}");
            match outcome {
                Outcome::DebugExit(code) => code,
                Outcome::Reset => 3,
                Outcome::GuestPanic => 4,
                _ => 0,
            }
        }
    })
}
