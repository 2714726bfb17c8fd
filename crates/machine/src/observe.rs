//! Looking at a running machine: its vCPUs' reports, and profiles.

use crate::linux::{KERNEL, Linux, Space};
use crate::machine::Machine;
use crate::vcpu::profile::Profile;
use crate::vcpu::report::Report;
use cpu::HostCode;
use serde_json::{Value, json};
use std::fmt::Write;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How long a vCPU may take to answer: one that stands still never does, and its last word counts.
const PATIENCE: Duration = Duration::from_millis(300);
/// The longest profile.
const PROFILE_MAX: Duration = Duration::from_secs(600);
/// The most samples a second.
const RATE_HZ_MAX: u32 = 5000;

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One at a time.
    #[error("somebody else is taking a profile of this guest now; try again later")]
    Busy,
    /// A length or a rate that makes no sense.
    #[error(
        "a profile takes up to {} s at 1 to {RATE_HZ_MAX} samples a second, not {length:?} at {rate_hz}",
        PROFILE_MAX.as_secs()
    )]
    Range {
        /// As asked for.
        length: Duration,
        /// As asked for.
        rate_hz: u32,
    },
}

impl Machine {
    /// What each vCPU tells about itself.
    pub(crate) fn reports(&self) -> Vec<Report> {
        self.asked(false)
    }

    fn asked(&self, code: bool) -> Vec<Report> {
        let slots = &self.common().slots;
        let until = Instant::now().checked_add(PATIENCE);
        let asked: Vec<_> = slots.iter().map(|slot| slot.ask_report(code)).collect();
        let left = || until.map_or(PATIENCE, |until| until.saturating_duration_since(Instant::now()));
        slots.iter().zip(asked).filter_map(|(slot, number)| slot.report(number, left())).collect()
    }

    /// What the vCPUs have counted since the machine was made.
    pub fn statistics(&self) -> Value {
        json!({
            "engine": self.engine_name(),
            "vm_time_ns": self.common().clock.now().0,
            "starts": self.starts(),
            "vcpus": self.reports().iter().map(Report::statistics).collect::<Vec<_>>(),
        })
    }

    /// Where the guest's time goes: looks at all vCPUs `rate_hz` times a second. A Linux guest's functions and processes
    /// are named.
    pub fn profile(&self, length: Duration, rate_hz: u32) -> Result<Value, Error> {
        if rate_hz == 0 || rate_hz > RATE_HZ_MAX || length > PROFILE_MAX {
            return Err(Error::Range { length, rate_hz });
        }
        let current = || self.common().profile.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut current = current();
            if current.is_some() {
                return Err(Error::Busy);
            }
            // Before the kernel is searched, so that one thread does that at a time.
            *current = Some(Arc::new(Profile::new(None)));
        }
        let profile = Arc::new(Profile::new(self.linux()));
        *current() = Some(profile.clone());
        let (began, turns) = self.take_samples(&profile, length, rate_hz);
        *current() = None;
        let mut told = profile.told();
        if let Some(told) = told.as_object_mut() {
            told.insert("seconds".into(), began.elapsed().as_secs_f64().into());
            told.insert("turns".into(), turns.into());
        }
        Ok(told)
    }

    /// What of this process's memory is code made from which code of the guest, in the form that `perf` reads from
    /// `/tmp/perf-PID.map`: start, length, name, one a line, numbers in hexadecimal. Empty where the engine makes none.
    pub fn perf_map(&self) -> String {
        let reports = self.asked(true);
        let mut code: Vec<HostCode> = self.common().slots.iter().flat_map(|slot| slot.take_code()).collect();
        code.sort_unstable_by_key(|code| code.address);
        let memory = &self.common().memory;
        let linux = reports.iter().find_map(|report| {
            let space = Space::of(memory, &report.registers)?;
            Some((Linux::find(&space)?, space.places(KERNEL)))
        });
        let name = |code: &HostCode| match (&linux, code.user) {
            (_, true) => "(user code)".to_owned(),
            (None, false) => "(kernel)".to_owned(),
            (Some((linux, places)), false) => match places.get(&(code.guest & !0xfff)) {
                Some(&linear) => linux.function(linear | code.guest & 0xfff).to_owned(),
                None => "(a module)".to_owned(),
            },
        };
        let mut text = String::new();
        let mut run: Option<(u64, u64, String)> = None;
        for code in &code {
            let (name, end) = (name(code), code.address.saturating_add(u64::from(code.len)));
            match &mut run {
                Some((_, last, known)) if *last == code.address && *known == name => *last = end,
                _ => {
                    line(&mut text, run.replace((code.address, end, name)));
                }
            }
        }
        line(&mut text, run);
        text
    }

    fn take_samples(&self, profile: &Profile, length: Duration, rate_hz: u32) -> (Instant, u64) {
        let period = Duration::from_secs(1).checked_div(rate_hz).unwrap_or(Duration::from_millis(1));
        let began = Instant::now();
        let (mut next, mut turns) = (began, 0u64);
        while began.elapsed() < length && self.outcome().is_none() {
            for slot in self.common().slots.iter() {
                match slot.ask_sample() {
                    None => profile.idle(),
                    Some(true) => {}
                    Some(false) => profile.missed(),
                }
            }
            turns = turns.saturating_add(1);
            next = next.checked_add(period).unwrap_or(next).max(Instant::now());
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        // The last answers.
        std::thread::sleep(period.min(Duration::from_millis(20)));
        (began, turns)
    }

    /// The guest's kernel, if it is a Linux that can be read: from the address space of any vCPU that maps it.
    fn linux(&self) -> Option<Linux> {
        let memory = &self.common().memory;
        self.reports().iter().find_map(|report| Linux::find(&Space::of(memory, &report.registers)?))
    }
}

/// Writes a line of [`Machine::perf_map`].
fn line(text: &mut String, run: Option<(u64, u64, String)>) {
    if let Some((start, end, name)) = run {
        let _ = writeln!(text, "{start:x} {:x} guest:{name}", end.saturating_sub(start));
    }
}
