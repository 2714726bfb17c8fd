//! What the tests of the command are told with: a home of its own for each test, and the built `yado` as users run it.
//! Everything here panics when something is wrong, as tests do.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Nothing in a story takes longer, on a slow and busy host.
pub const LIMIT: Duration = Duration::from_secs(240);

/// For a guest's shell: sets `nvme` to the second NVMe disk by its place, whichever number the kernel has given it.
pub const FIND_SECOND_NVME: &str =
    "nvme=/dev/$(cd /sys/bus/pci/devices && ls -d */nvme/nvme* | sed -n '2s,.*/,,p')n1;";

/// A user's home: state and sockets of its own, the cache shared by all tests of one build.
pub struct Home {
    program: PathBuf,
    directory: tempfile::TempDir,
    cache: PathBuf,
}

/// How a command ended.
pub struct Finished {
    /// As the system tells it.
    pub status: ExitStatus,
    /// All of standard output.
    pub stdout: Vec<u8>,
    /// All of standard error.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Home {
    /// For the release build, with the cache that keeps downloads and images between tests.
    pub fn new() -> Self {
        let program = crate::target_directory().join("release/yado");
        assert!(program.is_file(), "{}: `cargo build --release` makes it", program.display());
        Self::with_cache(&program, &crate::target_directory().join("tmp/cache"))
    }

    /// For the release build, with nothing in its cache.
    pub fn fresh() -> Self {
        let program = &Self::new().program;
        Self::fresh_for(program)
    }

    /// For this build, with nothing in its cache.
    pub fn fresh_for(program: &Path) -> Self {
        let mut home = Self::with_cache(program, &std::env::temp_dir());
        home.cache = home.path().join("cache");
        std::fs::create_dir(&home.cache).unwrap();
        home
    }

    fn with_cache(program: &Path, cache: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for part in ["state", "run", "tmp"] {
            std::fs::create_dir(directory.path().join(part)).unwrap();
        }
        std::fs::create_dir_all(cache).unwrap();
        Self { program: program.to_owned(), directory, cache: cache.to_owned() }
    }

    /// The binary.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The user's home directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Its cache directory.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Writes a file into the home.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Writes a multiboot image of this 32-bit code.
    pub fn bare_kernel(&self, code: &[u8]) -> PathBuf {
        let load = 0x10_0000u32;
        let flags = 0x1_0000u32;
        let checksum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
        let mut image = Vec::new();
        for word in [0x1bad_b002, flags, checksum, load, load, 0, 0, load + 32] {
            image.extend_from_slice(&word.to_le_bytes());
        }
        image.extend_from_slice(code);
        self.file("kernel", &image)
    }

    /// Makes `command` one of this home's.
    pub fn adopt(&self, command: &mut Command) {
        command.env("XDG_STATE_HOME", self.path().join("state"));
        command.env("XDG_RUNTIME_DIR", self.path().join("run"));
        command.env("XDG_CACHE_HOME", &self.cache);
        command.env("TMPDIR", self.path().join("tmp"));
        command.env_remove("RUST_BACKTRACE");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }

    /// `yado` with arguments, not yet started. Guests have YADO_STORY_CPUS virtual CPUs where the story does not care.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        let cpus = std::env::var("YADO_STORY_CPUS").ok();
        match (arguments, cpus) {
            (["run", rest @ ..], Some(cpus)) if makes_a_guest(rest) => {
                command.args(["run", "--cpus", &cpus]).args(rest);
            }
            _ => {
                command.args(arguments);
            }
        }
        self.adopt(&mut command);
        command
    }

    /// `yado` with arguments, to its end.
    pub fn yado(&self, arguments: &[&str]) -> Finished {
        finish(self.command(arguments).spawn().unwrap(), &[])
    }

    /// The same, given `input` on standard input.
    pub fn yado_with_input(&self, arguments: &[&str], input: &[u8]) -> Finished {
        finish(self.command(arguments).stdin(Stdio::piped()).spawn().unwrap(), input)
    }

    /// Runs a shell command in the current Debian guest; answers what it printed, without the last newline.
    pub fn in_guest(&self, name: &str, script: &str) -> String {
        let finished = self.yado(&["exec", name, "--", "sh", "-c", script]);
        assert!(finished.status.success(), "{script:?} failed: {}", finished.all());
        String::from_utf8(finished.stdout).unwrap().trim_end().to_owned()
    }

    /// Waits until the guest has configured its packages, which it begins soon after its first boot.
    pub fn wait_configured(&self, name: &str) {
        let half = "dpkg-query -W -f '${db:Status-Abbrev}\\n' | grep -qv '^ii '";
        self.in_guest(
            name,
            &format!("n=0; while {half}; do sleep 2; n=$((n+1)); [ $n -lt 90 ] || exit 1; done"),
        );
    }

    /// Neither guests, sockets, half-written files nor processes of this home are left.
    pub fn assert_nothing_left(&self) {
        for place in ["state/yado/vms", "run/yado", "tmp"] {
            let left = names_in(&self.path().join(place));
            assert!(left.is_empty(), "left in {place}: {left:?}");
        }
        let left = names_in(&self.cache.join("yado/debian/partial"));
        assert!(left.is_empty(), "left half written in the cache: {left:?}");
        let until = Instant::now() + Duration::from_secs(5);
        while !self.processes().is_empty() {
            assert!(Instant::now() < until, "processes that still run: {:?}", self.processes());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Processes that were started for this home.
    pub fn processes(&self) -> Vec<u32> {
        let mark = format!("XDG_STATE_HOME={}", self.path().join("state").display()).into_bytes();
        let ids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            let variables = std::fs::read(entry.path().join("environ")).ok()?;
            variables.split(|byte| *byte == 0).any(|variable| variable == mark).then_some(id)
        });
        ids.collect()
    }
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // A test that failed leaves no guest behind.
        for id in self.processes() {
            signal(id, "KILL");
        }
    }
}

impl Finished {
    /// The exit code; 128 + n if signal n ended yado itself.
    pub fn code(&self) -> i32 {
        self.status.code().or(self.status.signal().map(|number| 128 + number)).unwrap()
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// For messages of failed tests.
    pub fn all(&self) -> String {
        let out = String::from_utf8_lossy(&self.stdout);
        let tail: Vec<&str> = out.lines().rev().take(30).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        format!(
            "{} after {:?}\n--- stderr\n{}--- end of stdout\n{}",
            self.status,
            self.took,
            self.stderr,
            tail.join("\n")
        )
    }

    /// It failed with this code and exactly one line on standard error, which says `what`.
    pub fn assert_refused(&self, code: i32, what: &str) {
        assert_eq!(self.code(), code, "{}", self.all());
        let lines: Vec<&str> = self.stderr.lines().collect();
        assert!(lines.len() == 1 && lines[0].starts_with("yado: "), "one sentence is wanted: {}", self.all());
        assert!(lines[0].contains(what), "{what:?} is not in: {}", lines[0]);
        assert!(lines[0].len() < 400 && !lines[0].contains("panicked"), "{}", lines[0]);
    }

    /// It ended well.
    pub fn assert_success(&self) {
        assert!(self.status.success(), "{}", self.all());
    }
}

/// Whether these arguments of `yado run` are for a new guest and leave open how many virtual CPUs it has.
fn makes_a_guest(arguments: &[&str]) -> bool {
    let own = arguments.split(|argument| *argument == "--").next().unwrap_or_default();
    let has = |name: &str| own.iter().any(|argument| argument.starts_with(name));
    let source = ["debian", "--kernel"].into_iter().any(has);
    source && !has("--cpus")
}

/// Feeds a process and waits for it.
pub fn finish(mut child: Child, input: &[u8]) -> Finished {
    let began = Instant::now();
    let id = child.id();
    let stdin = child.stdin.take();
    let (out, err) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        let feeder = scope.spawn(move || {
            // The other side may well leave before it has read all.
            let _ = stdin.map(|mut stdin| stdin.write_all(input));
        });
        let out = scope.spawn(move || read_all(out));
        let err = scope.spawn(move || read_all(err));
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if began.elapsed() > LIMIT {
                child.kill().unwrap();
                break child.wait().unwrap();
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let took = began.elapsed();
        let (stdout, stderr) = (out.join().unwrap(), err.join().unwrap());
        feeder.join().unwrap();
        let finished =
            Finished { status, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned(), took };
        assert!(took <= LIMIT, "process {id} did not end in time: {}", finished.all());
        finished
    })
}

fn read_all(stream: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        let _ = stream.read_to_end(&mut bytes);
    }
    bytes
}

fn names_in(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Sends a signal by name.
pub fn signal(process: u32, name: &str) {
    let _ =
        Command::new("kill").arg(format!("-{name}")).arg(process.to_string()).stderr(Stdio::null()).status();
}

/// Waits until `condition` holds.
pub fn until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < limit, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Bytes that look random and are the same each time.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
