//! What bad input gets before any guest runs: one clear sentence, the documented exit code, nothing left behind.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use xtask::story::{self, Home};

fn home() -> Home {
    Home::fresh_for(Path::new(env!("CARGO_BIN_EXE_yado")))
}

/// Refused with `code` and a sentence that has `what` in it, and nothing is left.
fn refused(home: &Home, arguments: &[&str], code: i32, what: &str) {
    home.yado(arguments).assert_refused(code, what);
    home.assert_nothing_left();
}

/// A bzImage's first sectors, as a broken download leaves them: everything a header has, and nothing behind it.
fn cut_off_kernel() -> Vec<u8> {
    let mut file = vec![0u8; 0x600];
    file[0x1f1] = 4; // setup sectors
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&[0x0f, 0x02]); // protocol 2.15
    file[0x1f4..0x1f8].copy_from_slice(&0x1000u32.to_le_bytes()); // 64 KiB of kernel, in paragraphs
    file[0x236] = 1; // 64-bit entry
    file
}

#[test]
fn usage_is_explained_with_code_2() {
    let home = home();
    for arguments in
        [&["run"][..], &["frobnicate"], &["run", "debian", "--memory", "lots"], &["exec", "x"], &[]]
    {
        let finished = home.yado(arguments);
        assert_eq!(finished.code(), 2, "{arguments:?}: {}", finished.all());
        assert!(
            finished.stderr.contains("Usage") || finished.stderr.contains("error:"),
            "{}",
            finished.all()
        );
    }
    home.assert_nothing_left();
}

#[test]
fn a_kernel_that_is_not_there() {
    let home = home();
    refused(&home, &["run", "-q", "--kernel", "/no/such/kernel"], 125, "/no/such/kernel");
    refused(&home, &["run", "-q", "--kernel", "/"], 125, "/");
}

#[test]
fn a_kernel_that_is_cut_off() {
    let home = home();
    let kernel = home.file("vmlinuz", &cut_off_kernel());
    refused(&home, &["run", "-q", "--kernel", kernel.to_str().unwrap()], 125, "cut off");
}

#[test]
fn a_kernel_of_another_architecture() {
    let home = home();
    // linux/Documentation/arch/arm64/booting.rst: "ARM\x64" at 56.
    let mut image = vec![0u8; 4096];
    image[56..60].copy_from_slice(b"ARM\x64");
    let kernel = home.file("Image", &image);
    refused(&home, &["run", "-q", "--kernel", kernel.to_str().unwrap()], 125, "64-bit x86");
    // An ELF file for RISC-V.
    let mut elf = vec![0u8; 4096];
    elf[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
    elf[16..20].copy_from_slice(&[2, 0, 243, 0]);
    let kernel = home.file("vmlinux", &elf);
    refused(&home, &["run", "-q", "--kernel", kernel.to_str().unwrap()], 125, "64-bit x86");
}

#[test]
fn a_file_that_is_no_kernel() {
    let home = home();
    for (name, content) in [("empty", &b""[..]), ("text", b"hello\n"), ("noise", &story::noise(5000))] {
        let kernel = home.file(name, content);
        let finished = home.yado(&["run", "-q", "--kernel", kernel.to_str().unwrap()]);
        finished.assert_refused(125, "kernel");
    }
    home.assert_nothing_left();
}

#[test]
fn an_initrd_that_is_not_there() {
    let home = home();
    let kernel = home.file("vmlinuz", &cut_off_kernel());
    let line = ["run", "-q", "--kernel", kernel.to_str().unwrap(), "--initrd", "/no/initrd"];
    refused(&home, &line, 125, "/no/initrd");
}

#[test]
fn images_that_cannot_be_used() {
    let home = home();
    refused(&home, &["run", "-q", "/no/such/disk.img"], 125, "/no/such/disk.img");
    refused(&home, &["run", "-q", "debain"], 125, "debain");
    let kernel = home.file("vmlinuz", &cut_off_kernel());
    let kernel = kernel.to_str().unwrap();
    refused(
        &home,
        &["run", "-q", "--kernel", kernel, "--disk", "/no/such/disk.img"],
        125,
        "/no/such/disk.img",
    );
}

#[test]
fn disks_of_formats_that_are_not_here() {
    let home = home();
    let finished = home.yado(&["run", "-q", "debian", "--disk", "a.vdi,format=vdi"]);
    assert_eq!(finished.code(), 2, "{}", finished.all());
    assert!(finished.stderr.contains("there are raw, qcow2"), "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn memory_that_is_too_small_or_larger_than_the_host() {
    let home = home();
    refused(&home, &["run", "-q", "debian", "--memory", "1M"], 2, "at least");
    refused(&home, &["run", "-q", "debian", "--memory", "64T"], 2, "choose less");
}

#[test]
fn guests_that_do_not_exist() {
    let home = home();
    for line in [
        &["exec", "ghost", "--", "true"][..],
        &["stop", "ghost"],
        &["logs", "ghost"],
        &["console", "ghost"],
        &["inspect", "ghost"],
        &["pause", "ghost"],
        &["rm", "ghost"],
    ] {
        refused(&home, line, 125, "no guest called ghost");
    }
    refused(&home, &["run", "-q", "debian", "--name", "../x"], 125, "cannot be a guest's name");
}

#[test]
fn a_mirror_that_is_down() {
    let home = home();
    // A port that nobody listens on: it was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mirror = format!("http://127.0.0.1:{port}/debian");
    refused(&home, &["run", "-q", "debian:trixie", "--mirror", &mirror], 125, "--mirror");
}

/// Answers every request with `body`.
fn liar(body: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                let head =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
            });
        }
    });
    format!("http://{address}/debian")
}

#[test]
fn a_mirror_without_debians_signature() {
    let home = home();
    let unsigned = liar(
        b"Origin: Debian\nSuite: stable\nCodename: trixie\nDate: Sat, 12 Sep 2026 07:55:41 UTC\nSHA256:\n",
    );
    refused(&home, &["run", "-q", "debian:trixie", "--mirror", &unsigned], 125, "sign");
    let login_page = liar(b"<html>Please log in to the hotel's network</html>");
    refused(&home, &["run", "-q", "debian:trixie", "--mirror", &login_page], 125, "sign");
}

#[test]
fn no_place_for_state() {
    let home = home();
    let file = home.file("not-a-directory", b"");
    let mut command = home.command(&["run", "-q", "--kernel", "/no/such/kernel"]);
    command.env("XDG_STATE_HOME", &file);
    story::finish(command.spawn().unwrap(), &[]).assert_refused(125, "not-a-directory");
}

#[test]
fn nothing_to_list_is_no_error() {
    let home = home();
    let listed = home.yado(&["ps", "--all", "--json"]);
    listed.assert_success();
    assert_eq!(listed.text().trim(), "[]");
    assert!(home.yado(&["ps"]).text().starts_with("NAME"));
}

#[test]
fn the_doctor_knows_this_host() {
    let home = home();
    let report = home.yado(&["doctor", "--json"]);
    report.assert_success();
    let report: serde_json::Value = serde_json::from_slice(&report.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap();
    for what in ["CPU", "KVM", "soft engine", "memory", "cache"] {
        assert!(findings.iter().any(|finding| finding["what"] == what), "{what} is not in {report}");
    }
    assert!(report["default_cpu"].is_string());
}

#[test]
fn completions_and_manual_pages_are_made() {
    let home = home();
    let script = home.yado(&["completion", "bash"]);
    script.assert_success();
    assert!(script.text().contains("_yado"));
    let pages = home.path().join("man");
    home.yado(&["man", pages.to_str().unwrap()]).assert_success();
    assert!(std::fs::read_to_string(pages.join("yado-run.1")).unwrap().contains(".TH"));
}

#[test]
fn output_that_nobody_takes_is_no_crash() {
    let run = |arguments: &[&str], out: std::process::Stdio, error: std::process::Stdio| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_yado"));
        command.args(arguments).stdout(out).stderr(error).status().unwrap().code()
    };
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap().into();
    // A disk that is full is an error, and said where that can be.
    assert_eq!(run(&["doctor", "--json"], full(), std::process::Stdio::null()), Some(125));
    assert_eq!(run(&["doctor", "--json"], full(), full()), Some(125));
    assert_eq!(run(&["rm", "nobody"], std::process::Stdio::null(), full()), Some(125));
    // Who closes a pipe has read enough.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(run(&["doctor", "--json"], writer.into(), std::process::Stdio::null()), Some(0));
}
