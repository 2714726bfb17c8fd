//! `yado image serve`, and the other image commands over its exports.

use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn yado(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_yado"));
    command.arg("image").args(arguments).stdin(Stdio::null());
    command
}

fn succeeds(arguments: &[&str]) -> String {
    let output = yado(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A running server; killed with the value, if it has not ended.
struct Serving(Option<Child>);

impl Serving {
    fn start(socket: &Path, arguments: &[&str]) -> Self {
        let mut command = yado(&["serve", "--socket", socket.to_str().unwrap()]);
        let child = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut this = Self(Some(child));
        let until = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            if Instant::now() > until
                || this.0.as_mut().is_some_and(|child| child.try_wait().unwrap().is_some())
            {
                panic!("it does not serve: {:?}", this.end("INT"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        this
    }

    fn end(mut self, signal: &str) -> Output {
        let child = self.0.take().unwrap();
        if !signal.is_empty() {
            Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
        }
        child.wait_with_output().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

#[test]
fn images_are_served_used_and_left_whole() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name).display().to_string();
    let bytes: Vec<u8> =
        (0..2usize << 20).map(|at| if at & (1 << 18) == 0 { (at % 241) as u8 } else { 0 }).collect();
    std::fs::write(place("raw"), &bytes).unwrap();
    succeeds(&["create", "-q", "-f", "qcow2", &place("empty"), "2M"]);
    let socket = directory.path().join("socket");
    let (raw, empty) = (format!("disk={}", place("raw")), format!("new={},format=qcow2", place("empty")));
    let serving = Serving::start(&socket, &["--json", &format!("{raw},readonly"), &empty]);
    // Our own commands over the network: into the other export, and into a file.
    succeeds(&["convert", "-n", "-f", "raw", "-O", "raw", &uri(&socket, "disk"), &uri(&socket, "new")]);
    assert!(
        succeeds(&["compare", "-f", "raw", "-F", "raw", &uri(&socket, "new"), &place("raw")])
            .contains("identical")
    );
    succeeds(&["convert", "-f", "raw", "-O", "qcow2", &uri(&socket, "new"), &place("copy")]);
    let info: Value = serde_json::from_str(&succeeds(&["info", "--json", &uri(&socket, "disk")])).unwrap();
    assert_eq!((info["virtual-size"].as_u64(), info["format"].as_str()), (Some(2 << 20), Some("raw")));
    let map: Value =
        serde_json::from_str(&succeeds(&["map", "--json", "-f", "raw", &uri(&socket, "new")])).unwrap();
    let holes = map.as_array().unwrap().iter().filter(|row| row["zero"] == true).count();
    assert_eq!(holes, 4, "{map}");
    let refused = yado(&["convert", "-O", "raw", &place("raw"), &uri(&socket, "new")]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    let refused = yado(&["resize", "-f", "raw", &uri(&socket, "disk"), "4M"]).output().unwrap();
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("read-only"));
    let output = serving.end("INT");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let reports: Vec<Value> =
        serde_json::Deserializer::from_str(&text).into_iter().map(Result::unwrap).collect();
    assert_eq!(reports[0]["exports"][1]["name"], "new");
    assert_eq!(reports[1]["bytes-written"], 1 << 20);
    assert!(!socket.exists());
    assert!(succeeds(&["check", "-f", "qcow2", &place("empty")]).contains("No errors"));
    assert!(succeeds(&["compare", &place("raw"), &place("copy"), "-F", "qcow2"]).contains("identical"));
    assert!(succeeds(&["compare", &place("raw"), &place("empty"), "-F", "qcow2"]).contains("identical"));
}

#[test]
fn a_snapshot_is_served_once() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(place("raw"), vec![7; 1 << 20]).unwrap();
    succeeds(&["convert", "-f", "raw", "-O", "qcow2", &place("raw"), &place("q")]);
    succeeds(&["snapshot", "-q", "-c", "before", &place("q")]);
    let socket = directory.path().join("socket");
    let serving =
        Serving::start(&socket, &["--once", "-x", "old", "-f", "qcow2", "--snapshot", "before", &place("q")]);
    assert!(
        succeeds(&["compare", "-f", "raw", "-F", "raw", &uri(&socket, "old"), &place("raw")])
            .contains("identical")
    );
    let output = serving.end("");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("read-only") && text.contains("Served"), "{text}");
}

#[test]
fn bad_lines_are_refused() {
    for line in
        [&["serve", "x.img"][..], &["serve", "--listen", "nowhere", "/dev/null"], &["serve", "--socket", "s"]]
    {
        assert_eq!(yado(line).output().unwrap().status.code().map(|code| code > 0), Some(true), "{line:?}");
    }
    let two = yado(&["serve", "--socket", "s", "/etc/passwd", "/etc/group"]).output().unwrap();
    assert_eq!(two.status.code(), Some(2));
}

/// A script written for qemu-nbd: in the background with a pid file, ended by a signal; and once, ended by its last client.
#[test]
fn called_qemu_nbd_it_does_what_that_does() {
    let place = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_yado"), place.path().join("qemu-nbd")).unwrap();
    let script = r#"
set -e
truncate -s 1M image
./qemu-nbd --fork --pid-file pid -t -e 2 -f raw -x disk -D text --discard=unmap -k "$PWD/s" image
test "$(nbdinfo --size "nbd+unix:///disk?socket=$PWD/s")" = 1048576
qemu-io -f raw -c 'write -P 7 4096 4096' -c 'discard 0 4096' -c flush "nbd+unix:///disk?socket=$PWD/s"
kill "$(cat pid)"
while test -e pid; do sleep 0.05; done
test ! -e s
test "$(od -An -tx1 -j4096 -N1 image)" = " 07"
timeout 20 ./qemu-nbd -v --fork --pid-file pid -t -e 0 -f raw -k "$PWD/s" image > said
test "$(cat said)" = ""
python3 - "$PWD/s" <<'EOF'
import socket, sys
# None of them has to wait for the others.
for client in [socket.socket(socket.AF_UNIX) for _ in range(3)]:
    client.settimeout(20)
    client.connect(sys.argv[1])
    assert client.recv(8) == b"NBDMAGIC"
    globals().setdefault("all", []).append(client)
EOF
test "$(ps -o sid= -p "$(cat pid)")" -eq "$(cat pid)"
kill "$(cat pid)"
while test -e pid; do sleep 0.05; done
./qemu-nbd -r -f raw -o 4096 -k "$PWD/s" image & server=$!
while test ! -e s; do sleep 0.05; done
nbdcopy "nbd+unix:///?socket=$PWD/s" part
wait "$server"
cmp part image -i 0:4096
code=0; ./qemu-nbd --fork -k "$PWD/s" missing 2> said || code=$?
test "$code" = 1
grep -q '^qemu-nbd: .*missing' said
code=0; ./qemu-nbd --nonsense 2> said || code=$?
test "$code" = 1
./qemu-nbd --version | grep -q qemu-nbd
"#;
    let output =
        Command::new("timeout").args(["60", "sh", "-c", script]).current_dir(place.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
