//! The network of a guest that was given none of its own: what its user reaches it reaches, and ports lead in.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;
use xtask::story::{Home, noise, until};

#[test]
fn packages_come_over_the_network() {
    let home = Home::new();
    let finished = home.yado(&["run", "-q", "debian", "--", "apt-get", "update"]);
    finished.assert_success();
    assert!(finished.text().contains("Reading package lists"), "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn every_byte_arrives_at_the_host_and_back() {
    let home = Home::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (up, down) = (noise(3_000_000), noise(5_000_000));
    let (expected, sent) = (up.clone(), down.clone());
    let host = std::thread::spawn(move || {
        let (mut guest, _) = listener.accept().unwrap();
        let mut got = vec![0; expected.len()];
        guest.read_exact(&mut got).unwrap();
        assert!(got == expected, "other bytes came to the host");
        guest.write_all(&sent).unwrap();
    });
    let script = format!("exec 3<>/dev/tcp/host.yado/{port}; cat >&3; cat <&3");
    let words = ["run", "-q", "--net", "user,host-loopback", "debian", "--", "bash", "-c", &script];
    let finished = home.yado_with_input(&words, &up);
    finished.assert_success();
    assert!(finished.stdout == down, "{} bytes came to the guest, or others", finished.stdout.len());
    host.join().unwrap();
}

#[test]
fn the_hosts_own_services_are_out_of_reach() {
    let home = Home::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!("exec 3<>/dev/tcp/host.yado/{port}");
    let finished = home.yado(&["run", "-q", "debian", "--", "bash", "-c", &script]);
    assert_eq!(finished.code(), 1, "{}", finished.all());
    // By IPv6 and by IPv4, whichever the guest tried last.
    let refused = ["refused", "unreachable"].iter().any(|word| finished.stderr.contains(word));
    assert!(refused, "{}", finished.stderr);
    assert!(listener.accept().is_err(), "nobody came");
    let finished = home.yado(&["run", "-q", "--net", "none", "debian", "--", "ls", "/sys/class/net"]);
    assert_eq!(finished.text(), "lo\n");
}

#[test]
fn a_port_leads_into_the_guest() {
    let home = Home::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let client = std::thread::spawn(move || {
        // Nobody listens before the guest has booted; who comes too early waits or is sent away.
        until("an answer from the guest", Duration::from_secs(200), || {
            let Ok(mut guest) = TcpStream::connect(("127.0.0.1", port)) else { return false };
            let mut said = String::new();
            guest.write_all(b"who is there?\n").is_ok()
                && guest.read_to_string(&mut said).is_ok()
                && said == "the guest\n"
        });
    });
    let server = "$s = IO::Socket::INET->new(LocalPort => 7, Listen => 5) or die; \
                  $c = $s->accept; print scalar <$c>; print $c qq(the guest\\n);";
    let publish = format!("{port}:7");
    let words = ["run", "-q", "-p", &publish, "debian", "--", "perl", "-MIO::Socket::INET", "-e", server];
    let finished = home.yado(&words);
    finished.assert_success();
    assert_eq!(finished.text(), "who is there?\n");
    client.join().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let publish = format!("{}:7", taken.local_addr().unwrap().port());
    home.yado(&["run", "-q", "-p", &publish, "debian", "--", "true"])
        .assert_refused(125, "choose another port");
}
