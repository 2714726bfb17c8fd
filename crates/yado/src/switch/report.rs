//! What switches look like, for people and as JSON.

use anyhow::Result;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn ports_of(tree: &Value) -> &[Value] {
    tree["ports"].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or(0)
}

fn width<'a>(names: impl Iterator<Item = &'a str>, least: usize) -> usize {
    names.map(str::len).max().unwrap_or(0).max(least)
}

/// `yado switch ls`
pub fn list(switches: &[(String, Value)], as_json: bool) -> Result<()> {
    if as_json {
        let list: Vec<Value> = switches
            .iter()
            .map(|(name, tree)| json!({ "name": name, "pid": tree["pid"], "ports": ports_of(tree).len(), "addresses": tree["addresses"] }))
            .collect();
        println!("{}", serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    let width = width(switches.iter().map(|(name, _)| name.as_str()), 4);
    println!("{:width$}  {:>5}  {:>9}  {:>8}", "NAME", "PORTS", "ADDRESSES", "PROCESS");
    for (name, tree) in switches {
        println!(
            "{name:width$}  {:>5}  {:>9}  {:>8}",
            ports_of(tree).len(),
            number(tree, "addresses"),
            number(tree, "pid")
        );
    }
    Ok(())
}

/// `yado switch ports`
pub fn ports(tree: &Value, as_json: bool) -> Result<()> {
    if as_json {
        println!("{}", serde_json::to_string_pretty(&tree["ports"])?);
        return Ok(());
    }
    let ports = ports_of(tree);
    let names = width(ports.iter().map(|port| text(port, "name")), 4);
    let vlans = width(ports.iter().map(|port| text(port, "vlans")), 4);
    println!(
        "{:names$}  {:9}  {:vlans$}  {:>4}  {:>12}  {:>12}  {:>8}  STATE",
        "NAME", "LINK", "VLAN", "MACS", "FROM IT", "TO IT", "DROPPED"
    );
    for port in ports {
        let sum = |value: &Value| {
            value.as_object().map_or(0, |drops| drops.values().filter_map(Value::as_u64).sum())
        };
        let dropped: u64 = sum(&port["dropped"]) + sum(&port["dropped_out"]);
        println!(
            "{:names$}  {:9}  {:vlans$}  {:>4}  {:>12}  {:>12}  {dropped:>8}  {}",
            text(port, "name"),
            text(port, "link"),
            text(port, "vlans"),
            number(port, "learnt"),
            number(port, "received"),
            number(port, "sent"),
            text(port, "state"),
        );
        for why in port["broken"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            println!("{:names$}  {why}", "");
        }
    }
    Ok(())
}

/// What a direction's limit is, for people.
fn limit_text(limit: &Value) -> String {
    let Some(bits) = limit["bits_per_second"].as_u64() else { return "-".to_owned() };
    let mut text = scaled(bits as f64);
    if let Some(frames) = limit["frames_per_second"].as_u64() {
        text.push_str(&format!(", {} frames/s", scaled(frames as f64)));
    }
    text
}

/// `yado switch limit`, of one group or of all
pub fn limits(tree: &Value, group: Option<&str>, as_json: bool) -> Result<()> {
    let all = json!({ "name": null, "spec": tree["limits"], "ports": null });
    let groups = tree["groups"].as_array().into_iter().flatten().cloned();
    let list: Vec<Value> = std::iter::once(all)
        .chain(groups)
        .filter(|entry| group.is_none_or(|name| entry["name"] == name))
        .collect();
    anyhow::ensure!(!list.is_empty(), "there is no group {}", group.unwrap_or_default());
    if as_json {
        println!("{}", serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    let names = width(list.iter().map(|entry| entry["name"].as_str().unwrap_or("(switch)")), 5);
    println!(
        "{:names$}  {:>14}  {:>14}  {:>6}  {:>8}  {:>8}  PORTS",
        "GROUP", "UP", "DOWN", "WEIGHT", "MIN UP", "MIN DOWN"
    );
    for entry in &list {
        let share = &entry["spec"]["share"];
        let promised = |field: &str| share[field].as_u64().map_or("-".to_owned(), |bits| scaled(bits as f64));
        let ports: Vec<&str> =
            entry["ports"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        println!(
            "{:names$}  {:>14}  {:>14}  {:>6}  {:>8}  {:>8}  {}",
            entry["name"].as_str().unwrap_or("(switch)"),
            limit_text(&entry["spec"]["up"]),
            limit_text(&entry["spec"]["down"]),
            share["weight"].as_u64().unwrap_or(1),
            promised("min_up"),
            promised("min_down"),
            if entry["name"].is_null() { "all".to_owned() } else { ports.join(" ") }
        );
    }
    Ok(())
}

/// `yado switch addresses`
pub fn addresses(list: &Value, as_json: bool) -> Result<()> {
    if as_json {
        println!("{}", serde_json::to_string_pretty(list)?);
        return Ok(());
    }
    println!("{:17}  {:>4}  {:5}  PORT", "ADDRESS", "VLAN", "FIXED");
    for entry in list.as_array().into_iter().flatten() {
        let fixed = if entry["fixed"] == true { "yes" } else { "" };
        println!(
            "{:17}  {:>4}  {fixed:5}  {}",
            text(entry, "address"),
            number(entry, "vlan"),
            text(entry, "port")
        );
    }
    Ok(())
}

/// `yado switch multicast`
pub fn multicast(tree: &Value, as_json: bool) -> Result<()> {
    if as_json {
        println!("{}", serde_json::to_string_pretty(tree)?);
        return Ok(());
    }
    println!("{:39}  {:>4}  {:>7}  PORT", "GROUP", "VLAN", "SECONDS");
    let mut rows = Vec::new();
    for (list, what) in [("members", None), ("routers", Some("(all: a router)"))] {
        for entry in tree[list].as_array().into_iter().flatten() {
            let group = what.unwrap_or_else(|| text(entry, "group"));
            let (vlan, seconds) = (number(entry, "vlan"), number(entry, "seconds"));
            rows.push((vlan, format!("{group:39}  {vlan:>4}  {seconds:>7}  {}", text(entry, "port"))));
        }
    }
    rows.sort();
    rows.iter().for_each(|(_, row)| println!("{row}"));
    Ok(())
}

/// What goes through a port each second.
pub struct Rates {
    /// A switch's name, or a guest's.
    place: String,
    /// `switch` or `guest`.
    kind: &'static str,
    port: Value,
    seconds: f64,
    before: Value,
}

impl Rates {
    fn rate(&self, field: &str) -> f64 {
        number(&self.port, field).saturating_sub(number(&self.before, field)) as f64 / self.seconds
    }

    /// Bits each second, both ways.
    pub fn bits(&self) -> f64 {
        (self.rate("received_bytes") + self.rate("sent_bytes")) * 8.0
    }
}

/// Measures the ports of some places for a while: `look` answers them with their trees.
pub fn rates(
    look: impl Fn() -> Result<Vec<(String, Value)>>,
    kind: &'static str,
    interval: Duration,
) -> Result<Vec<Rates>> {
    let began = Instant::now();
    let look = || look().map(|places| (began.elapsed(), places));
    let (first, before) = look()?;
    std::thread::sleep(interval);
    let mut rates = Vec::new();
    let (last, after) = look()?;
    for (place, after) in after {
        let Some((_, before)) = before.iter().find(|(name, _)| *name == place) else { continue };
        // A switch says itself when it has counted.
        let passed = match (after["time_ns"].as_u64(), before["time_ns"].as_u64()) {
            (Some(after), Some(before)) => after.saturating_sub(before) as f64 / 1e9,
            _ => last.saturating_sub(first).as_secs_f64(),
        };
        for port in ports_of(&after) {
            let old =
                ports_of(before).iter().find(|old| old["name"] == port["name"]).cloned().unwrap_or_default();
            rates.push(Rates {
                place: place.clone(),
                kind,
                port: port.clone(),
                seconds: passed.max(0.001),
                before: old,
            });
        }
    }
    Ok(rates)
}

/// `10.5M`
fn scaled(value: f64) -> String {
    match value {
        ..1e3 => format!("{value:.0}"),
        ..1e6 => format!("{:.1}k", value / 1e3),
        ..1e9 => format!("{:.1}M", value / 1e6),
        _ => format!("{:.2}G", value / 1e9),
    }
}

/// `yado switch stats`, `yado net top`
pub fn print_rates(rates: &[Rates], as_json: bool) -> Result<()> {
    if as_json {
        let list: Vec<Value> = rates
            .iter()
            .map(|rates| {
                json!({ rates.kind: rates.place, "port": rates.port["name"], "seconds": rates.seconds,
                    "received_per_second": rates.rate("received"), "sent_per_second": rates.rate("sent"),
                    "received_bits_per_second": rates.rate("received_bytes") * 8.0,
                    "sent_bits_per_second": rates.rate("sent_bytes") * 8.0,
                    "dropped": rates.port["dropped"], "dropped_out": rates.port["dropped_out"] })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    let switches = width(rates.iter().map(|rates| rates.place.as_str()), 6);
    let names = width(rates.iter().map(|rates| text(&rates.port, "name")), 4);
    println!(
        "{:switches$}  {:names$}  {:>8}  {:>8}  {:>8}  {:>8}  DROPPED SO FAR",
        "PLACE", "PORT", "FROM b/s", "FRAMES/s", "TO b/s", "FRAMES/s"
    );
    for rates in rates {
        let reasons = |value: &Value, way: &str| -> Vec<String> {
            let drops = value.as_object().into_iter().flatten();
            let some = drops.filter(|(_, count)| count.as_u64() != Some(0));
            some.map(|(reason, count)| format!("{way}{reason} {count}")).collect()
        };
        let mut drops = reasons(&rates.port["dropped"], "");
        drops.extend(reasons(&rates.port["dropped_out"], "to it: "));
        println!(
            "{:switches$}  {:names$}  {:>8}  {:>8}  {:>8}  {:>8}  {}",
            rates.place,
            text(&rates.port, "name"),
            scaled(rates.rate("received_bytes") * 8.0),
            scaled(rates.rate("received")),
            scaled(rates.rate("sent_bytes") * 8.0),
            scaled(rates.rate("sent")),
            drops.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn rates_are_per_second() {
        let rates = Rates {
            place: "s".to_owned(),
            kind: "switch",
            port: json!({ "received_bytes": 3000, "sent_bytes": 1000 }),
            before: json!({ "received_bytes": 1000 }),
            seconds: 2.0,
        };
        assert_eq!(rates.bits(), 12_000.0);
        assert_eq!([scaled(999.0), scaled(1500.0), scaled(2.5e9)], ["999", "1.5k", "2.50G"]);
    }
}
