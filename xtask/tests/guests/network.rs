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

#[test]
fn guests_of_one_user_reach_each_other_by_name_and_can_be_looked_at() {
    let home = Home::new();
    for (name, net) in [("web", "user"), ("db", "user"), ("alone", "user,isolated")] {
        home.yado(&["run", "-q", "-d", "--name", name, "--net", net, "debian"]).assert_success();
    }
    let reaches = |from: &str, to: &str| {
        let script = format!("timeout 5 bash -c 'exec 3<>/dev/tcp/{to}/7; cat <&3' 2> /dev/null || echo no");
        home.in_guest(from, &script)
    };
    let server = "setsid perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 7, Listen => 5) or die; \
                  while ($c = $s->accept) { print $c $c->peerhost, qq( x), q(y) x 100000, qq(\\n); close $c }' > /dev/null 2>&1 < /dev/null &";
    for name in ["web", "db", "alone"] {
        home.yado(&["exec", "--timeout", "200", name, "--", "sh", "-c", server]).assert_success();
    }
    let file = home.path().join("web.pcapng");
    let capture =
        ["net", "capture", "web", "-w", file.to_str().unwrap(), "--seconds", "20"].map(str::to_owned);
    std::thread::scope(|scope| {
        let capture = scope.spawn(|| home.yado(&capture.each_ref().map(String::as_str)));
        until("an answer of db's", Duration::from_secs(60), || reaches("web", "db.yado").contains("xyyy"));
        // By the search list, too.
        let said = reaches("web", "db");
        assert_eq!(said.len(), said.find(" x").unwrap() + 2 + 100_000, "{}", &said[..60]);
        let web = home.in_guest("db", "getent ahostsv4 web.yado | head -1");
        assert_eq!(said.split(' ').next(), web.split(' ').next(), "db sees web under its name's address");
        assert_eq!([reaches("alone", "web.yado"), reaches("web", "alone.yado")], ["no", "no"]);
        assert_eq!(home.in_guest("web", "ping -c 1 -W 5 db > /dev/null && echo yes"), "yes");
        let top = home.yado(&["net", "top", "--json", "-i", "0.2"]);
        top.assert_success();
        let rates: serde_json::Value = serde_json::from_slice(&top.stdout).unwrap();
        let web = rates.as_array().unwrap().iter().find(|row| row["guest"] == "web").unwrap();
        assert_eq!(web["port"], "net0", "{web}");
        capture.join().unwrap().assert_success();
    });
    let bytes = std::fs::read(&file).unwrap();
    let has = |text: &[u8]| bytes.windows(text.len()).any(|part| part == text);
    assert!(bytes.starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]) && has(b"net0"));
    assert!(has(b"\x02db\x04yado") && has(&[b'y'; 500]), "the question and the answer are in the capture");
    for name in ["web", "db", "alone"] {
        home.yado(&["stop", "--force", name]).assert_success();
        home.yado(&["rm", name]).assert_success();
    }
    home.assert_nothing_left();
}
