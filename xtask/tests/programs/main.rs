//! Real programs inside a Debian guest, judged by what the same work gives on the host: package management, a compiler, an
//! interpreter, cryptography, and every byte of a file tree. And kernels that are not the usual one.

mod foreign;
mod kernels;
mod slow;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use xtask::story::{FIND_SECOND_NVME, Home};

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
    a_compiled_program_says_the_same_on_both(&home, PROGRAM, "-lm", 3);
    a_compiled_program_says_the_same_on_both(&home, ZLIB, "-lz", 0);
    a_compiled_program_says_the_same_on_both(&home, BREAKPOINTS, "", 0);
    python_computes(&home);
    openssl_agrees_with_itself(&home);
    the_same_binaries_say_the_same_on_both(&home);
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

/// A tracer with the CPU's breakpoints on writes, accesses and execution, and single steps.
const BREAKPOINTS: &str = r#"
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>
static volatile long words[8];
static volatile long sum;
__attribute__((noinline)) void visited(long n) { sum += n; }
static int child;
static int status;
static void poke(int number, unsigned long value) {
    ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg) + 8 * number, value);
}
static long peek(size_t offset) { return ptrace(PTRACE_PEEKUSER, child, offset, 0); }
static void go_on(int how) { ptrace(how, child, 0, 0); waitpid(child, &status, 0); }
int main(void) {
    child = fork();
    if (!child) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        for (long i = 0; i < 40; i++) {
            for (long j = 0; j < 20000; j++) sum += i ^ j;
            words[1] = i;
            sum += words[2];
            visited(i);
            words[3]++;
        }
        _exit(sum == 0);
    }
    waitpid(child, &status, 0);
    /* Writes of words[1], reads and writes of words[2], execution of visited(), for this task alone. */
    poke(0, (unsigned long)&words[1]);
    poke(1, (unsigned long)&words[2]);
    poke(2, (unsigned long)visited);
    poke(7, 1 | 4 | 16 | 0x9ul << 16 | 0xbul << 20 | 0x0ul << 24);
    int hits[3] = {0};
    long steps = 0, calls = 0, rest = 0;
    for (go_on(PTRACE_CONT); WIFSTOPPED(status); go_on(PTRACE_CONT)) {
        long why = peek(offsetof(struct user, u_debugreg) + 48);
        for (int i = 0; i < 3; i++) hits[i] += why >> i & 1;
        rest += why & 15 ? 0 : 1;
        poke(6, 0);
        if (why & 4) {
            /* Through the function, one instruction at a time. */
            long stack = peek(offsetof(struct user, regs.rsp));
            do { go_on(PTRACE_SINGLESTEP); steps++; } while (peek(offsetof(struct user, regs.rsp)) <= stack);
            calls++;
        }
    }
    printf("%d writes, %d accesses, %d calls in %ld steps, %ld other stops, exit %d\n", hits[0], hits[1], hits[2], steps, rest, WEXITSTATUS(status));
    return calls != 40;
}
"#;

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

/// Every level and strategy there and back, in one piece and byte by byte, with a dictionary; broken streams.
const ZLIB: &str = r#"
#include <stdio.h>
#include <string.h>
#include <zlib.h>
static unsigned char data[200000], packed[400000], back[200000], small[1000];
int main(void) {
    unsigned long long x = 88172645463325252ULL;
    for (int i = 0; i < 200000; i++) {
        x ^= x << 13; x ^= x >> 7; x ^= x << 17;
        data[i] = i % 3000 < 2000 ? "the quick brown fox "[i % 20] : x % 7 ? x & 15 : x;
    }
    printf("%s %08lx %08lx\n", zlibVersion(), crc32(0, data, sizeof data), adler32(1, data, sizeof data));
    for (int level = 0; level <= 9; level++)
        for (int strategy = 0; strategy <= 4; strategy++) {
            z_stream z = {0};
            if (deflateInit2(&z, level, Z_DEFLATED, strategy % 2 ? 31 : -15, 1 + level % 9, strategy)) return 1;
            z.next_in = data; z.avail_in = sizeof data; z.next_out = packed; z.avail_out = sizeof packed;
            if (deflate(&z, Z_FINISH) != Z_STREAM_END) return 2;
            unsigned long size = z.total_out;
            deflateEnd(&z);
            memset(&z, 0, sizeof z);
            if (inflateInit2(&z, strategy % 2 ? 31 : -15)) return 3;
            z.next_in = packed; z.next_out = back; z.avail_out = sizeof back;
            int code = Z_OK;
            for (unsigned long i = 0; i < size && code == Z_OK; i++) { z.avail_in = 1; code = inflate(&z, Z_NO_FLUSH); }
            inflateEnd(&z);
            if (code != Z_STREAM_END || memcmp(data, back, sizeof data)) return 4;
            printf("%d %d %lu %08lx\n", level, strategy, size, crc32(0, packed, size));
        }
    z_stream z = {0};
    deflateInit(&z, 9); deflateSetDictionary(&z, data, 3000);
    z.next_in = data; z.avail_in = 5000; z.next_out = small; z.avail_out = sizeof small;
    printf("%d %lu\n", deflate(&z, Z_FINISH), z.total_out);
    deflateEnd(&z);
    uLongf size = sizeof back;
    packed[100] ^= 1;
    printf("%d %d\n", uncompress(back, &size, packed, 1000), uncompress(back, &size, small, 10));
    return 0;
}
"#;

/// gcc compiles in the guest; the program runs there and on the host.
fn a_compiled_program_says_the_same_on_both(home: &Home, source: &str, library: &str, code: i32) {
    let compile = format!("gcc -O2 -static -o /tmp/program -x c - {library} && cat /tmp/program");
    let built = home.yado_with_input(&["exec", "workshop", "--", "sh", "-c", &compile], source.as_bytes());
    built.assert_success();
    let program = home.file("program", &built.stdout);
    Command::new("chmod").arg("755").arg(&program).status().unwrap();
    let on_host = Command::new(&program).output().unwrap();
    let in_guest = home.yado(&["exec", "workshop", "--", "/tmp/program"]);
    assert_eq!((in_guest.code(), on_host.status.code()), (code, Some(code)), "{}", in_guest.all());
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

/// The guest's own openssl and python3, taken out of it with their libraries, do the same work on the host.
fn the_same_binaries_say_the_same_on_both(home: &Home) {
    const OPENSSL: &str = r#"
head -c 300000 /dev/zero | tr '\0' 'q' > data
for sum in md5 sha1 sha256 sha512 sha3-256 blake2b512 shake128 sm3 ripemd160; do $RUN openssl dgst -$sum -r < data; done
for cipher in aes-128-cbc aes-256-ctr aes-128-ofb camellia-192-cbc aria-128-ctr sm4-cbc des-ede3-cbc chacha20; do
    $RUN openssl enc -$cipher -pbkdf2 -k key -S 0102030405060708 < data > sealed
    $RUN openssl dgst -sha256 -r < sealed
    $RUN openssl enc -d -$cipher -pbkdf2 -k key -S 0102030405060708 < sealed | cmp - data && echo $cipher
done
$RUN openssl prime 170141183460469231731687303715884105727
$RUN openssl prime 170141183460469231731687303715884105729
$RUN openssl kdf -keylen 32 -kdfopt pass:x -kdfopt salt:yyyyyyyy -kdfopt n:1024 -kdfopt r:8 -kdfopt p:1 SCRYPT
"#;
    const PYTHON: &str = r#"
$RUN python3 -S -c '
import math, random, hashlib, zlib, struct
r = random.Random(7)
h = hashlib.sha256()
for i in range(20000):
    x = r.uniform(-50, 50)
    for f in (math.sin, math.cos, math.tan, math.exp, math.atan, math.erf, math.cbrt, lambda v: math.fmod(v, 0.7)):
        h.update(struct.pack("<d", f(x)))
print(h.hexdigest(), repr(math.fsum(r.random() for _ in range(50000))))
print((3**20000 // 7**3000) % 10**40)
print(zlib.crc32(repr(sorted(r.gauss(0, 1) for _ in range(20000))).encode()))
print(complex(1.5, -2.25) ** 3.7, (0.1 + 0.2).hex(), round(2.675, 2), 7.1 // 0.3)
'
"#;
    let take = "cd / && tar -chf - --exclude=__pycache__ usr/bin/openssl usr/bin/python3 usr/lib/python3.* \
                lib64/ld-linux-x86-64.so.2 \
                $(ldd /usr/bin/openssl /usr/bin/python3 | grep -o '/lib/[^ ]*' | sort -u | sed 's|^/|usr/|')";
    let taken = home.yado(&["exec", "workshop", "--", "sh", "-c", take]);
    taken.assert_success();
    let tree = home.path().join("taken");
    std::fs::create_dir(&tree).unwrap();
    let unpacked =
        Command::new("tar").args(["-xf", "-", "-C"]).arg(&tree).stdin(std::process::Stdio::piped()).spawn();
    assert!(xtask::story::finish(unpacked.unwrap(), &taken.stdout).status.success());
    let root = tree.display();
    let on_host = format!(
        "cd {root}; export PYTHONHOME={root}/usr OPENSSL_CONF=/dev/null\n\
         run() {{ program=$1; shift; {root}/lib64/ld-linux-x86-64.so.2 --library-path \
         {root}/usr/lib/x86_64-linux-gnu {root}/usr/bin/$program \"$@\"; }}\nRUN=run\n"
    );
    for script in [OPENSSL, PYTHON] {
        let inside = home.yado(&[
            "exec",
            "workshop",
            "--",
            "sh",
            "-c",
            &format!("cd /tmp; export OPENSSL_CONF=/dev/null; RUN=\n{script}"),
        ]);
        inside.assert_success();
        let outside = Command::new("sh").args(["-c", &format!("{on_host}{script}")]).output().unwrap();
        assert!(outside.status.success(), "{}", String::from_utf8_lossy(&outside.stderr));
        assert_eq!(inside.text(), String::from_utf8(outside.stdout).unwrap());
    }
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

/// No network is needed to install packages: they come on further disks. The guest has just booted and has not configured its own
/// packages yet, which dpkg does first.
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
    package_with_scripts(&home, &packages);
    let disk = home.path().join("packages.img");
    std::fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let mkfs = xtask::setup::find("mkfs.ext4").expect("`cargo xtask setup` installs e2fsprogs");
    assert!(Command::new(mkfs).arg("-q").arg("-d").arg(&packages).arg(&disk).status().unwrap().success());
    let disks: Vec<String> =
        ["nvme", "virtio"].map(|bus| format!("{},readonly,bus={bus}", disk.display())).into();
    // Both ways to install; both kinds of disks.
    let script = "set -e; exec 3>&1 >&2; mount -o ro $nvme /mnt; mount -o ro /dev/vda /media; \
                  dpkg -i /mnt/hello_*.deb; hello >&3; apt-get -q -y install /media/tree_*.deb /media/guestbook.deb; \
                  tree --version | cut -c1-4 >&3; cat /var/lib/guestbook >&3; id -u guestbook >&3; \
                  apt-get -q -y remove hello; ! command -v hello; dpkg -P guestbook; cat /var/lib/guestbook >&3; \
                  dpkg --audit >&3; dpkg-query -W -f '${db:Status-Abbrev}\\n' | sort -u >&3";
    let script = format!("{FIND_SECOND_NVME} {script}");
    let line = ["run", "-q", "debian", "--disk", &disks[0], "--disk", &disks[1], "--", "sh", "-c", &script];
    let finished = home.yado(&line);
    finished.assert_success();
    let wanted = "Hello, world!\ntree\npreinst install\npostinst configure\n777\n\
                  preinst install\npostinst configure\nprerm remove\npostrm purge\nii \n";
    assert_eq!(finished.text(), wanted, "{}", finished.all());
    home.assert_nothing_left();
}

/// A package whose maintainer scripts say that they ran, and add a user as many do.
fn package_with_scripts(home: &Home, packages: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let tree = home.path().join("guestbook");
    let control = tree.join("DEBIAN");
    std::fs::create_dir_all(&control).unwrap();
    let text = "Package: guestbook\nVersion: 1\nArchitecture: all\nDepends: adduser\n\
                Maintainer: nobody <nobody@example.org>\nDescription: who was here\n";
    std::fs::write(control.join("control"), text).unwrap();
    for (name, more) in [
        ("preinst", ""),
        ("postinst", "useradd --system --uid 777 guestbook"),
        ("prerm", "userdel guestbook"),
        ("postrm", ""),
    ] {
        let only = if name == "postrm" { "[ $1 = purge ] || exit 0" } else { "" };
        let script = format!("#!/bin/sh\nset -e\n{only}\necho {name} $1 >> /var/lib/guestbook\n{more}\n");
        std::fs::write(control.join(name), script).unwrap();
        std::fs::set_permissions(control.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let built = Command::new("dpkg-deb")
        .args(["--root-owner-group", "-b"])
        .stdout(std::process::Stdio::null())
        .arg(&tree)
        .arg(packages.join("guestbook.deb"))
        .status();
    assert!(built.unwrap().success());
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
