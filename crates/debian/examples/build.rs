//! Builds a guest image and says how long each phase took: `build SUITE [CACHE [MIRROR]]`.

use debian::{Phase, Progress, Request, build};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

#[derive(Default)]
struct Clock {
    phase: Option<(Phase, Instant)>,
    bytes: u64,
}

impl Progress for Clock {
    fn started(&mut self, phase: Phase, _: u64) {
        self.phase = Some((phase, Instant::now()));
        self.bytes = 0;
    }

    fn advanced(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    fn finished(&mut self) {
        if let Some((phase, start)) = self.phase.take() {
            println!("{phase:?}: {:.2} s, {} bytes", start.elapsed().as_secs_f64(), self.bytes);
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [suite, rest @ ..] = arguments.as_slice() else {
        return Err("usage: build SUITE [CACHE [MIRROR]]".into());
    };
    let cache = rest
        .first()
        .cloned()
        .unwrap_or_else(|| std::env::temp_dir().join("yado-debian-cache").display().to_string());
    let mut request = Request::new(cache);
    request.suite = (suite != "stable").then(|| suite.clone());
    request.mirrors = rest.get(1).cloned().into_iter().collect();
    request.index_age_max = Duration::from_secs(3600);
    let start = Instant::now();
    let image = build(&request, &mut Clock::default(), &AtomicBool::new(false))?;
    println!("all: {:.3} s", start.elapsed().as_secs_f64());
    println!("{image:#?}");
    Ok(())
}
