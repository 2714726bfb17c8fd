//! Long work shows itself: bars with bytes, rate and time left on a terminal, a line per phase elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// How often a log that is no terminal hears of a long phase.
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// Shows phases on standard error.
pub struct Phases {
    quiet: bool,
    terminal: bool,
    current: Option<Phase>,
}

struct Phase {
    name: String,
    total: Option<u64>,
    done: u64,
    bar: ProgressBar,
    began: Instant,
    logged: Instant,
}

impl Phases {
    /// Shows nothing when `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, terminal: std::io::stderr().is_terminal(), current: None }
    }

    /// One line about what yado does and why.
    pub fn say(&mut self, line: &str) {
        self.finish();
        if !self.quiet {
            eprintln!("yado: {line}");
        }
    }

    /// A new phase begins; `total` is in bytes.
    pub fn begin(&mut self, name: &str, total: Option<u64>) {
        self.finish();
        let bar = if self.quiet || !self.terminal { ProgressBar::hidden() } else { bar(name, total) };
        let now = Instant::now();
        self.current = Some(Phase { name: name.to_owned(), total, done: 0, bar, began: now, logged: now });
    }

    /// Bytes of the current phase are done.
    pub fn advance(&mut self, bytes: u64) {
        let (quiet, terminal) = (self.quiet, self.terminal);
        let Some(phase) = &mut self.current else { return };
        phase.done = phase.done.saturating_add(bytes);
        phase.bar.inc(bytes);
        if !quiet && !terminal && phase.logged.elapsed() >= LOG_PERIOD {
            phase.logged = Instant::now();
            eprintln!("yado: {}: {}", phase.name, amount(phase));
        }
    }

    /// The current phase is over.
    pub fn finish(&mut self) {
        let Some(phase) = self.current.take() else { return };
        phase.bar.finish_and_clear();
        let took = phase.began.elapsed();
        if !self.quiet && took >= Duration::from_millis(200) {
            eprintln!("yado: {}: {} in {:.1} s", phase.name, amount(&phase), took.as_secs_f32());
        }
    }
}

impl Drop for Phases {
    fn drop(&mut self) {
        if let Some(phase) = self.current.take() {
            phase.bar.finish_and_clear();
        }
    }
}

fn amount(phase: &Phase) -> String {
    match phase.total {
        _ if phase.done == 0 => "done".to_owned(),
        Some(total) if phase.done < total => {
            format!("{} of {}", crate::size::Size(phase.done), crate::size::Size(total))
        }
        _ => crate::size::Size(phase.done).to_string(),
    }
}

fn bar(name: &str, total: Option<u64>) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => (
            ProgressBar::new(total),
            "yado: {msg} {wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
        ),
        None => (ProgressBar::new_spinner(), "yado: {msg} {spinner} {elapsed}"),
    };
    bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(name.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
