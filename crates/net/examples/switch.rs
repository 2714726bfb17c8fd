//! A switch alone, for measurements: `switch DIRECTORY [PORTS]`. Its control socket and the vhost-user sockets of its ports `p0`, `p1`...
//! are in the directory. See docs/benchmarks/network.md.

use net::switch::control::{PortKind, Request, ask};
use net::switch::server::{Config, Server};
use net::switch::{ADDRESSES_MAX, AGEING_SECONDS, PortSpec};
use std::path::PathBuf;
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = PathBuf::from(arguments.next().ok_or("where?")?);
    let ports: u32 = arguments.next().map_or(Ok(2), |ports| ports.parse())?;
    let control = directory.join("control.sock");
    let config = Config {
        control: control.clone(),
        ports: directory,
        spin: Duration::from_micros(50),
        addresses_max: ADDRESSES_MAX,
        ageing_seconds: AGEING_SECONDS,
    };
    let server = Server::new(config)?;
    std::thread::spawn(move || {
        for number in 0..ports {
            let spec = PortSpec { trusted: true, ..PortSpec::default() };
            let request = Request::AddPort { name: format!("p{number}"), spec, kind: PortKind::Socket };
            match ask(&control, &request) {
                Ok(answer) => println!("{}", answer["socket"].as_str().unwrap_or_default()),
                Err(error) => eprintln!("{error}"),
            }
        }
    });
    Ok(server.run(&mut |line| eprintln!("{line}"))?)
}
