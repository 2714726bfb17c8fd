//! Guests on a switch: neighbours that reach each other and nobody else, and one that attacks the others in vain.

use serde_json::Value;
use std::time::Duration;
use xtask::story::{Home, until};

/// A home with a switch.
fn with_switch() -> Home {
    let home = Home::new();
    let created = home.yado(&["switch", "create", "lan"]);
    created.assert_success();
    assert_eq!(created.text(), "lan\n");
    home
}

/// Starts a guest with a card on the switch, and gives it an address.
fn start(home: &Home, name: &str, options: &str, number: u8) {
    let net = format!("switch=lan{options}");
    home.yado(&["run", "-q", "-d", "--name", name, "--net", &net, "debian"]).assert_success();
    let up = "until d=$(ls /sys/class/net | grep -v lo); do sleep 0.2; done; ip link set $d up";
    let script = format!("{up}; ip addr add 10.9.0.{number}/24 dev $d");
    home.yado(&["exec", "--timeout", "200", name, "--", "sh", "-c", &script]).assert_success();
}

fn reaches(home: &Home, from: &str, number: u8) -> bool {
    let script = format!("ping -c 1 -W 2 10.9.0.{number} > /dev/null && echo yes || echo no");
    home.in_guest(from, &script) == "yes"
}

fn port(home: &Home, name: &str) -> Value {
    let listed = home.yado(&["switch", "ports", "lan", "--json"]);
    listed.assert_success();
    let ports: Value = serde_json::from_slice(&listed.stdout).unwrap();
    ports.as_array().unwrap().iter().find(|port| port["name"] == name).unwrap().clone()
}

fn end(home: &Home, guests: &[&str]) {
    for name in guests {
        home.yado(&["stop", "--force", name]).assert_success();
        home.yado(&["rm", name]).assert_success();
    }
    home.yado(&["switch", "rm", "lan"]).assert_success();
    home.assert_nothing_left();
}

/// Frames that a program in the guest makes by itself.
const ATTACK: &str = r#"
use strict; use Socket;
my ($dev) = grep { !/lo/ } map { s{.*/}{}r } glob('/sys/class/net/*');
open(my $f, '<', "/sys/class/net/$dev/ifindex"); my $index = <$f> + 0;
open($f, '<', "/sys/class/net/$dev/address"); my $own = pack('H12', join('', split(/[:\n]/, <$f>)));
socket(my $s, 17, 3, 0x0300) or die;
my $to = pack('S n i S C C a8', 17, 3, $index, 0, 0, 6, "\xff" x 6);
sub put { send($s, pack('a60', $_[0]), 0, $to) or die "$!" }
my $victim = pack('H12', $ARGV[0]); my $all = "\xff" x 6;
# Be the victim: its address, and its IP address by ARP.
put("$all$victim\x88\xb5") for 1..50;
put("$all$own\x08\x06" . pack('H16', '0001080006040002') . $own . "\x0a\x09\x00\x01" . $own . "\x0a\x09\x00\x02") for 1..50;
# Fill the table.
put($all . pack('nN', 0x0200, $_) . "\x88\xb5") for 1..5000;
# Be the root of all bridges.
put("\x01\x80\xc2\x00\x00\x00$own" . pack('H6', '002642') . "\x42\x03" . "\x00" x 35) for 1..50;
# Hop into VLAN 7, with one tag and with two.
put("$all$own\x81\x00\x00\x07\x88\xb5"), put("$all$own\x81\x00\x00\x01\x81\x00\x00\x07\x88\xb5") for 1..50;
# Be a DHCP server, and a router.
put("$all$own\x08\x00" . pack('H40', '4500001c0000000040110000' . '0a090009ffffffff') . pack('nnnn', 67, 68, 8, 0)) for 1..50;
put("\x33\x33\x00\x00\x00\x01$own\x86\xdd" . pack('H16', '6000000000103aff') . pack('H32', 'fe80' . '0' x 27 . '9')
    . pack('H32', 'ff02' . '0' x 27 . '1') . pack('H32', '860000004000070800000000' . '00000000')) for 1..50;
"#;

#[test]
fn neighbours_reach_each_other_and_a_hostile_one_attacks_in_vain() {
    let home = with_switch();
    std::thread::scope(|scope| {
        scope.spawn(|| start(&home, "victim", ",mac=02:00:00:00:00:01", 1));
        scope.spawn(|| start(&home, "friend", "", 2));
        scope.spawn(|| start(&home, "hostile", "", 3));
    });
    assert!(reaches(&home, "victim", 2));
    what_is_sent_arrives(&home);
    vlans_are_apart(&home);
    attacks_are_in_vain(&home);
    a_guest_that_boots_again_is_there_again(&home);
    end(&home, &["victim", "friend", "hostile"]);
}

/// While somebody watches.
fn what_is_sent_arrives(home: &Home) {
    let file = home.path().join("seen.pcapng");
    let words = ["net", "capture", "friend", "-s", "96", "--seconds", "100", "-w", file.to_str().unwrap()];
    let mut watch = home.command(&words).spawn().unwrap();
    let server = "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 7, Listen => 5) or die; \
                  $c = $s->accept; print while read($c, $_, 65536)' | sha256sum > /tmp/got &";
    home.in_guest("friend", server);
    let client = "head -c 20000000 /dev/urandom > /tmp/data; until exec 3<>/dev/tcp/10.9.0.2/7; do sleep 0.5; done 2> /dev/null; \
                  cat /tmp/data >&3; exec 3>&-; sha256sum < /tmp/data";
    let sent = home.in_guest("victim", &format!("bash -c '{client}'"));
    until("the end of the transfer", Duration::from_secs(60), || {
        home.in_guest("friend", "cat /tmp/got") == sent
    });
    let _ = watch.kill();
    let _ = watch.wait();
    let seen = std::fs::read(&file).unwrap();
    assert!(seen.starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]) && seen.len() > 10_000, "{} bytes", seen.len());
}

/// Another VLAN is another network, until the port is moved, while the guest runs.
fn vlans_are_apart(home: &Home) {
    home.yado(&["switch", "set", "lan", "friend", "vlan=7"]).assert_success();
    assert!(!reaches(home, "victim", 2));
    home.yado(&["switch", "set", "lan", "friend", "vlan=1"]).assert_success();
    until("a way to the guest", Duration::from_secs(30), || reaches(home, "victim", 2));
}

fn a_guest_that_boots_again_is_there_again(home: &Home) {
    home.yado(&["exec", "friend", "--", "systemctl", "reboot"]);
    until("the guest after its reboot", Duration::from_secs(200), || {
        let script = "d=$(ls /sys/class/net | grep -v lo) && ip link set $d up && ip addr add 10.9.0.2/24 dev $d; ip addr";
        home.yado(&["exec", "friend", "--", "sh", "-c", script]).text().contains("10.9.0.2")
    });
    until("a way to the guest", Duration::from_secs(30), || reaches(home, "victim", 2));
}

fn attacks_are_in_vain(home: &Home) {
    let script = ATTACK.as_bytes();
    // The victim talks all the while.
    let pings = std::thread::scope(|scope| {
        let talk =
            scope.spawn(|| home.in_guest("victim", "ping -q -i 0.2 -c 40 10.9.0.2 | grep transmitted"));
        let words = ["exec", "hostile", "--", "perl", "-", "020000000001"];
        home.yado_with_input(&words, script).assert_success();
        talk.join().unwrap()
    });
    assert!(pings.contains("40 received"), "{pings}");
    let dropped = port(home, "hostile")["dropped"].clone();
    let count = |reason: &str| dropped[reason].as_u64().unwrap_or(0);
    assert!(count("spoofed") >= 5050 && count("arp_spoofed") >= 50, "{dropped}");
    assert!(count("reserved") >= 50 && count("vlan") >= 100, "{dropped}");
    assert!(count("dhcp_server") >= 50 && count("router") >= 50, "{dropped}");
    let listed = home.yado(&["switch", "addresses", "lan", "--json"]);
    let addresses: Value = serde_json::from_slice(&listed.stdout).unwrap();
    let known = addresses.as_array().unwrap();
    let victim = known.iter().find(|entry| entry["address"] == "02:00:00:00:00:01").unwrap();
    assert!(victim["port"] == "victim" && known.len() < 10, "{addresses}");
}
