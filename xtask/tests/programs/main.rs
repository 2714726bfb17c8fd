//! Real programs inside a Debian guest, judged by what the same work gives on the host: package management, a compiler, an
//! interpreter, cryptography, and every byte of a file tree.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use xtask::story::Home;

/// A guest with development tools, kept for the tests that share it.
const TOOLS: &[&str] = &["gcc", "libc6-dev", "python3", "openssl", "zlib1g-dev"];

fn workshop(home: &Home) {
    let mut line = vec!["run", "-q", "debian", "--name", "workshop", "--memory", "1G", "--detach"];
    for package in TOOLS {
        line.extend(["--package", package]);
    }
    home.yado(&line).assert_success();
    // First boot: the packages configure themselves.
    let state = home.in_guest("workshop", "systemctl is-system-running --wait || true");
    assert!(
        ["running", "degraded"].contains(&state.as_str()),
        "{state}: {}",
        home.in_guest("workshop", "systemctl --failed")
    );
}

#[test]
fn programs_work_as_on_the_host() {
    let home = Home::new();
    workshop(&home);
    packages_are_configured(&home);
    a_compiled_program_says_the_same_on_both(&home);
    python_computes(&home);
    openssl_agrees_with_itself(&home);
    home.yado(&["stop", "workshop"]).assert_success();
    home.yado(&["rm", "workshop"]).assert_success();
    home.assert_nothing_left();
}

fn packages_are_configured(home: &Home) {
    home.wait_configured("workshop");
    let half = home.in_guest(
        "workshop",
        "dpkg-query -W -f '${db:Status-Abbrev} ${Package}\\n' | grep -v '^ii ' || true",
    );
    assert_eq!(half, "", "packages that are not configured");
    assert_eq!(home.in_guest("workshop", "dpkg --audit"), "");
    let failed = home.in_guest("workshop", "systemctl --failed --no-legend --plain | cut -d' ' -f1");
    assert_eq!(failed, "", "units that failed");
    home.in_guest("workshop", "apt-get check -q && apt-cache policy bash | grep -q Installed");
}

const PROGRAM: &str = r#"
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int by_value(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }
int main(void) {
    uint64_t x = 88172645463325252ULL;
    int numbers[5000];
    for (int i = 0; i < 5000; i++) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; numbers[i] = (int)(x % 100000); }
    qsort(numbers, 5000, sizeof numbers[0], by_value);
    double sum = 0; long double wide = 1;
    for (int i = 0; i < 5000; i++) { sum += sqrt(numbers[i]) * sin(i); wide = wide * 0.9999L + numbers[i]; }
    unsigned __int128 product = (unsigned __int128)x * 0x123456789abcdefULL;
    printf("%d %d %.17g %.21Lg %016llx%016llx\n", numbers[0], numbers[4999], sum, wide,
           (unsigned long long)(product >> 64), (unsigned long long)product);
    char text[4096]; memset(text, 'a', sizeof text); text[4000] = 0;
    printf("%zu %a %.3f\n", strlen(text), pow(1.1, 700), tgamma(7.5));
    return 3;
}
"#;

/// gcc compiles in the guest; the program runs there and on the host.
fn a_compiled_program_says_the_same_on_both(home: &Home) {
    let compile = "gcc -O2 -static -o /tmp/program -x c - -lm && cat /tmp/program";
    let built = home.yado_with_input(&["exec", "workshop", "--", "sh", "-c", compile], PROGRAM.as_bytes());
    built.assert_success();
    let program = home.file("program", &built.stdout);
    Command::new("chmod").arg("755").arg(&program).status().unwrap();
    let on_host = Command::new(&program).output().unwrap();
    let in_guest = home.yado(&["exec", "workshop", "--", "/tmp/program"]);
    assert_eq!((in_guest.code(), on_host.status.code()), (3, Some(3)), "{}", in_guest.all());
    assert_eq!(in_guest.text(), String::from_utf8(on_host.stdout).unwrap());
}

fn python_computes(home: &Home) {
    let script = r#"
import hashlib, json, math, zlib, decimal, random, subprocess, threading
data = bytes(range(256)) * 4096
assert zlib.decompress(zlib.compress(data, 9)) == data
assert zlib.crc32(b"123456789") == 0xcbf43926
assert hashlib.sha256(b"abc").hexdigest() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
assert hashlib.md5(b"").hexdigest() == "d41d8cd98f00b204e9800998ecf8427e"
assert pow(3, 2**127 - 2, 2**127 - 1) == 1
assert math.factorial(100) % (10**9 + 7) == 437918130
decimal.getcontext().prec = 50
assert str(decimal.Decimal(2).sqrt()) == "1.4142135623730950488016887242096980785696718753769"
assert json.loads(json.dumps({"a": [1.5, None, "é"]})) == {"a": [1.5, None, "é"]}
assert random.Random(1).random() == 0.13436424411240122
results = []
threads = [threading.Thread(target=lambda n=n: results.append(n)) for n in range(50)]
[t.start() for t in threads]; [t.join() for t in threads]
assert sorted(results) == list(range(50))
assert subprocess.run(["sh", "-c", "exit 4"]).returncode == 4
print("python agrees")
"#;
    let finished = home.yado_with_input(&["exec", "workshop", "--", "python3", "-"], script.as_bytes());
    finished.assert_success();
    assert_eq!(finished.text(), "python agrees\n");
}

/// Keys, signatures and ciphers, with answers known from their standards.
fn openssl_agrees_with_itself(home: &Home) {
    let sum = home.in_guest("workshop", "printf abc | openssl dgst -sha512 -r | cut -c1-32");
    assert_eq!(sum, "ddaf35a193617abacc417349ae204131"); // FIPS 180-4
    let aes = "printf '\\000\\021\\042\\063\\104\\125\\146\\167\\210\\231\\252\\273\\314\\335\\356\\377' | \
               openssl enc -aes-128-ecb -nopad -K 000102030405060708090a0b0c0d0e0f | od -An -tx1 | tr -d ' \\n'";
    assert_eq!(home.in_guest("workshop", aes), "69c4e0d86a7b0430d8cdb78070b4c55a"); // FIPS 197, C.1
    for kind in ["rsa -pkeyopt rsa_keygen_bits:2048", "ec -pkeyopt ec_paramgen_curve:P-256", "ed25519"] {
        let script = format!(
            "cd /tmp && printf 'a message' > m && openssl genpkey -quiet -algorithm {kind} -out k && \
             openssl pkey -in k -pubout -out p && openssl pkeyutl -sign -rawin -inkey k -in m -out s && \
             openssl pkeyutl -verify -rawin -pubin -inkey p -in m -sigfile s"
        );
        assert!(home.in_guest("workshop", &script).contains("Verified"), "{kind}");
    }
    let round = "head -c 5000000 /dev/urandom > /tmp/r && openssl enc -chacha20 -pbkdf2 -k x -in /tmp/r | \
                 openssl enc -d -chacha20 -pbkdf2 -k x | cmp - /tmp/r && echo same";
    assert_eq!(home.in_guest("workshop", round), "same");
}

/// Every file that the image brought has in the guest the bytes that other people's ext4 reads from the image.
#[test]
fn a_file_tree_is_the_same_inside_and_outside() {
    let home = Home::new();
    let sums = "cd \"$0\" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum";
    const TREES: [&str; 2] = ["/usr/bin", "/usr/lib/systemd"];
    let line =
        ["run", "-q", "debian:trixie", "--", "sh", "-c", "for tree; do sh -c \"$0\" $tree; done", sums];
    let inside = home.yado(&[&line[..], &TREES].concat());
    inside.assert_success();
    let image = xtask::guest_files::cached(&home.cache().join("yado/debian"), "trixie").unwrap();
    let mut outside = String::new();
    for tree in TREES {
        let to = dump(&home, &image.disk, tree);
        let output = Command::new("sh").args(["-c", sums]).arg(to).output().unwrap();
        outside.push_str(&String::from_utf8(output.stdout).unwrap());
    }
    assert!(outside.lines().count() > 300, "only {} files", outside.lines().count());
    let differing: Vec<_> = inside
        .text()
        .lines()
        .zip(outside.lines())
        .filter(|(a, b)| a != b)
        .map(|(a, b)| format!("{a} | {b}"))
        .collect();
    assert!(inside.text() == outside, "{} lines differ, first {:?}", differing.len(), differing.first());
}

/// Copies a directory out of an image with e2fsprogs.
fn dump(home: &Home, disk: &Path, tree: &str) -> PathBuf {
    let to = home.path().join(tree.replace('/', "-"));
    std::fs::create_dir(&to).unwrap();
    let debugfs = xtask::setup::find("debugfs").expect("`cargo xtask setup` installs e2fsprogs");
    let request = format!("rdump {tree} {}", to.display());
    let output = Command::new(debugfs).arg("-R").arg(request).arg(disk).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    to.join(Path::new(tree).file_name().unwrap())
}

/// No network is needed to install packages: they come on a second disk.
#[test]
fn packages_from_a_second_disk() {
    let home = Home::new();
    let packages = home.path().join("packages");
    std::fs::create_dir(&packages).unwrap();
    let fetched = Command::new("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", "hello", "tree"])
        .current_dir(&packages)
        .output()
        .unwrap();
    assert!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
    let disk = home.path().join("packages.img");
    std::fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let mkfs = xtask::setup::find("mkfs.ext4").expect("`cargo xtask setup` installs e2fsprogs");
    assert!(Command::new(mkfs).arg("-q").arg("-d").arg(&packages).arg(&disk).status().unwrap().success());
    for bus in ["nvme", "virtio"] {
        let option = format!("{},readonly,bus={bus}", disk.display());
        let device = if bus == "nvme" { "/dev/nvme1n1" } else { "/dev/vda" };
        let script = format!(
            "set -e; modprobe -q virtio_blk || true; mount -o ro {device} /mnt; dpkg -i /mnt/*.deb >/dev/null; hello; tree --version | cut -c1-4; \
             dpkg -r hello >/dev/null; ! command -v hello >/dev/null"
        );
        let finished = home.yado(&["run", "-q", "debian", "--disk", &option, "--", "sh", "-c", &script]);
        finished.assert_success();
        assert_eq!(finished.text(), "Hello, world!\ntree\n", "{bus}: {}", finished.all());
    }
    home.assert_nothing_left();
}

/// The guest's clock goes as fast as the host's.
#[test]
fn time_passes_as_on_the_host() {
    let home = Home::new();
    let began = std::time::Instant::now();
    let finished = home.yado(&[
        "run",
        "-q",
        "debian",
        "--",
        "sh",
        "-c",
        "date +%s.%N; sleep 5; date +%s.%N; date -u +%Y-%m-%dT%H",
    ]);
    finished.assert_success();
    assert!(began.elapsed() >= Duration::from_secs(5));
    let text = finished.text();
    let lines: Vec<&str> = text.lines().collect();
    let slept = lines[1].parse::<f64>().unwrap() - lines[0].parse::<f64>().unwrap();
    assert!((5.0..5.5).contains(&slept), "sleep 5 took {slept} s of the guest's time");
    let host = Command::new("date").args(["-u", "+%Y-%m-%dT%H"]).output().unwrap();
    assert_eq!(lines[2], String::from_utf8(host.stdout).unwrap().trim());
}
