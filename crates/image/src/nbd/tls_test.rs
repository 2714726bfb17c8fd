//! TLS of both ends, among themselves and with other people's.

use super::client::test::Foreign;
use super::server::test::{Serving, export, succeeds};
use super::{NbdStorage, Policy, Tls};
use crate::format::Raw;
use crate::storage::Storage;
use std::path::Path;
use std::sync::Arc;

/// An authority, a server's and a client's certificate.
fn certificates() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let script = r#"
set -e
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority \
    -keyout ca-key.pem -out ca-cert.pem
for who in server client; do
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=$who -keyout $who-key.pem -out $who.csr
    printf 'subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n' > extensions
    openssl x509 -req -in $who.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
        -extfile extensions -out $who-cert.pem
done
"#;
    let output =
        std::process::Command::new("sh").args(["-c", script]).current_dir(directory.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    directory
}

fn serving(certificates: &Path, policy: Policy, verify: bool) -> Serving {
    let tls = Tls::load(certificates, policy, verify).unwrap();
    Serving::with_tls(|image| vec![export("", Arc::new(Raw::open(image, false).unwrap()))], tls)
}

fn encrypted(uri: &str, certificates: &Path) -> String {
    format!("{}&tls-certificates={}", uri.replacen("nbd", "nbds", 1), certificates.display())
}

fn connect(uri: &str) -> Result<NbdStorage, crate::Error> {
    NbdStorage::connect(&uri.parse().unwrap(), false)
}

fn exchange(storage: &NbdStorage) {
    let bytes: Vec<u8> = (0..3usize << 20).map(|at| (at % 239) as u8).collect();
    storage.write_bytes(512, &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    storage.read_bytes(512, &mut back).unwrap();
    assert!(back == bytes);
    storage.flush().unwrap();
}

#[test]
fn encrypted_connections_carry_everything_and_others_are_refused() {
    let certificates = certificates();
    let serving = serving(certificates.path(), Policy::Required, true);
    let uri = encrypted(&serving.uri(""), certificates.path());
    exchange(&connect(&uri).unwrap());
    let plain = connect(&serving.uri("")).err().unwrap().to_string();
    assert!(plain.contains("TLS"), "{plain}");
    // Without a certificate of its own a client gets nowhere; nor with another authority.
    let bare = tempfile::tempdir().unwrap();
    std::fs::copy(certificates.path().join("ca-cert.pem"), bare.path().join("ca-cert.pem")).unwrap();
    assert!(connect(&encrypted(&serving.uri(""), bare.path())).is_err());
    let stranger = self::certificates();
    assert!(connect(&encrypted(&serving.uri(""), stranger.path())).is_err());
    assert!(connect(&format!("{uri}&tls-hostname=elsewhere")).is_err());
}

#[test]
fn where_it_is_allowed_both_kinds_are_served() {
    let certificates = certificates();
    let serving = serving(certificates.path(), Policy::Allowed, false);
    exchange(&connect(&serving.uri("")).unwrap());
    exchange(&connect(&encrypted(&serving.uri(""), certificates.path())).unwrap());
    let unable = Serving::raw(false);
    let refused = connect(&encrypted(&unable.uri(""), certificates.path())).err().unwrap().to_string();
    assert!(refused.contains("no TLS"), "{refused}");
}

#[test]
fn other_peoples_ends_understand_ours() {
    let certificates = certificates();
    let place = certificates.path().display().to_string();
    let serving = serving(certificates.path(), Policy::Required, true);
    let script = format!(
        "h.set_tls(nbd.TLS_REQUIRE)\nh.set_tls_certificates('{place}')\nh.set_tls_verify_peer(False)\n\
         h.connect_unix('{}')\nassert h.get_tls_negotiated()\nh.pwrite(b'y' * 3000000, 7)\n\
         assert h.pread(3000000, 7) == b'y' * 3000000\nh.shutdown()\n",
        serving.socket.display()
    );
    succeeds("nbdsh", &["-c", &script]);
    let foreign = Foreign::nbdkit(&[
        "--tls=require",
        &format!("--tls-certificates={place}"),
        "--tls-verify-peer",
        "memory",
        "4M",
    ]);
    exchange(&connect(&encrypted(&foreign.uri(""), certificates.path())).unwrap());
}

/// Many long writes and reads at once on each connection: who sends must not keep others from receiving, or both ends wait
/// for each other as soon as the sockets are full.
#[test]
fn long_requests_both_ways_do_not_wait_for_each_other() {
    let certificates = certificates();
    let serving = serving(certificates.path(), Policy::Required, false);
    let uri = format!("{}&timeout=5&reconnect=0", encrypted(&serving.uri(""), certificates.path()));
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let storage = connect(&uri).unwrap();
        std::thread::scope(|scope| {
            // More each way than both sockets hold.
            for number in 0..48 {
                let storage = &storage;
                scope.spawn(move || {
                    let mut bytes = vec![number as u8; 4 << 20];
                    // By fours, so that each of the four connections has both kinds.
                    match number / 4 % 2 {
                        0 => storage.write_bytes(0, &bytes).unwrap(),
                        _ => storage.read_bytes(0, &mut bytes).unwrap(),
                    }
                });
            }
        });
        done.send(()).unwrap();
    });
    wait.recv_timeout(std::time::Duration::from_secs(50)).expect("both ends wait for each other");
}
