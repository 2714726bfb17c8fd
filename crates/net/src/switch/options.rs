//! A port's spec as people write it: `vlan=5,private,down=100M`.

use super::emulation::Emulation;
use super::limit::Limit;
use super::port::PortSpec;
use super::share::{GroupSpec, ShareSpec, WEIGHT_MAX};
use super::vlan::{VlanSet, Vlans, vlan};

/// All options, for messages and help.
pub const OPTIONS: &str = "vlan=N, trunk=A-B+C, native=N, tunnel=N, service-tags, priority=P, mac=ADDRESS+..., macs=N, ip=ADDRESS+..., \
trust, private, bpdu-guard, storm=FRAMES, rate=RATE, up=RATE, down=RATE, burst=BYTES, pps=FRAMES, group=NAME, weight=N, min=RATE, \
min-up=RATE, min-down=RATE, delay=MS, jitter=MS, loss=PERCENT, \
duplicate=PERCENT, reorder=PERCENT, disabled";

/// `10M`: bits each second, in powers of 1000.
fn rate(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text.get(digits.len()..).unwrap_or_default().to_ascii_lowercase().as_str() {
        "" | "bit" => 1.0,
        "k" | "kbit" => 1e3,
        "m" | "mbit" => 1e6,
        "g" | "gbit" => 1e9,
        _ => 0.0,
    };
    let value = digits
        .parse::<f64>()
        .ok()
        .map(|number| number * factor)
        .filter(|value| *value >= 8.0 && *value < 1e15);
    value
        .map(|value| value as u64)
        .ok_or_else(|| format!("{text:?} is no rate: bits each second, such as 500k, 10M or 2.5G"))
}

/// All options of groups of ports.
pub const GROUP_OPTIONS: &str =
    "rate=RATE, up=RATE, down=RATE, burst=BYTES, pps=FRAMES, weight=N, min=RATE, min-up=RATE, min-down=RATE";

/// A number of something, in powers of 1000.
fn count(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (text.trim_end_matches(['k', 'K']), 1000),
        Some(b'M') => (text.trim_end_matches('M'), 1_000_000),
        _ => (text, 1),
    };
    let value =
        digits.parse::<u64>().ok().and_then(|value| value.checked_mul(factor)).filter(|value| *value > 0);
    value.ok_or_else(|| format!("{text:?} is no number above 0"))
}

/// `0.5%`, as parts of a million.
fn share(text: &str) -> Result<u32, String> {
    let value = text.trim_end_matches('%').parse::<f64>().ok().filter(|value| (0.0..=100.0).contains(value));
    value
        .map(|value| (value * 10_000.0) as u32)
        .ok_or_else(|| format!("{text:?} is no percentage from 0 to 100"))
}

/// `20ms`, `1.5` or `200us`, as microseconds.
fn microseconds(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.strip_suffix("us") {
        Some(digits) => (digits, 1.0),
        None => (text.trim_end_matches("ms"), 1000.0),
    };
    let value =
        digits.parse::<f64>().ok().map(|value| value * factor).filter(|value| (0.0..=60e6).contains(value));
    value
        .map(|value| value as u64)
        .ok_or_else(|| format!("{text:?} is no time: milliseconds up to 60000, such as 20ms or 200us"))
}

fn list<T: std::str::FromStr>(text: &str, what: &str) -> Result<Vec<T>, String> {
    let items: Option<Vec<T>> = text.split('+').map(|item| item.parse().ok()).collect();
    items.ok_or_else(|| format!("{text:?} is no {what}, nor several with + between them"))
}

impl PortSpec {
    /// Applies one option; `None` if there is no such option. `off` and `none` take a thing back.
    pub fn apply(&mut self, name: &str, value: &str) -> Option<Result<(), String>> {
        Some(self.try_apply(name, value)?.map_err(|why| format!("{name}: {why}")))
    }

    fn try_apply(&mut self, name: &str, value: &str) -> Option<Result<(), String>> {
        let none = matches!(value, "none" | "off");
        let switch = |flag: &mut bool| match value {
            "" | "on" => {
                *flag = true;
                Ok(())
            }
            "off" => {
                *flag = false;
                Ok(())
            }
            _ => Err(format!("{value:?}: on or off")),
        };
        if let Some(result) = limit(&mut self.up, &mut self.down, &mut self.share, name, value) {
            return Some(result);
        }
        let Emulation { loss_ppm, duplicate_ppm, reorder_ppm, delay_us, jitter_us } = &mut self.emulation;
        Some(match name {
            "vlan" => vlan(value).map(|vlan| self.vlans = Vlans::Access(vlan)),
            "tunnel" => vlan(value).map(|vlan| self.vlans = Vlans::Tunnel(vlan)),
            "trunk" => value.parse::<VlanSet>().map(|tagged| {
                let (native, service) = match self.vlans {
                    Vlans::Trunk { native, service, .. } => (native, service),
                    _ => (None, false),
                };
                self.vlans = Vlans::Trunk { tagged, native, service };
            }),
            "native" | "service-tags" => {
                let Vlans::Trunk { native, service, .. } = &mut self.vlans else {
                    return Some(Err("only a trunk has it: say trunk=A-B first".to_owned()));
                };
                match name {
                    "service-tags" => switch(service),
                    _ if none => {
                        *native = None;
                        Ok(())
                    }
                    _ => vlan(value).map(|vlan| *native = Some(vlan)),
                }
            }
            "priority" => value
                .parse()
                .ok()
                .filter(|priority| *priority < 8)
                .map(|priority| self.priority = priority)
                .ok_or(format!("{value:?}: 0 to 7")),
            "mac" if none => {
                self.macs.clear();
                Ok(())
            }
            "mac" => list(value, "address").map(|macs| self.macs = macs),
            "macs" => count(value).map(|count| {
                self.macs.clear();
                self.macs_max = usize::try_from(count).ok();
            }),
            "ip" if none => {
                self.addresses.clear();
                Ok(())
            }
            "ip" => list(value, "IP address").map(|addresses| self.addresses = addresses),
            "trust" => switch(&mut self.trusted),
            "private" => switch(&mut self.private),
            "bpdu-guard" => switch(&mut self.bpdu_guard),
            "disabled" => switch(&mut self.disabled),
            "storm" if none => {
                self.storm = None;
                Ok(())
            }
            "storm" => count(value).map(|count| self.storm = Some(count)),
            "group" if none => {
                self.group = None;
                Ok(())
            }
            "group" if value.is_empty() => Err("which one?".to_owned()),
            "group" => {
                self.group = Some(value.to_owned());
                Ok(())
            }
            "loss" => share(value).map(|share| *loss_ppm = share),
            "duplicate" => share(value).map(|share| *duplicate_ppm = share),
            "reorder" => share(value).map(|share| *reorder_ppm = share),
            "delay" => microseconds(value).map(|time| *delay_us = time),
            "jitter" => microseconds(value).map(|time| *jitter_us = time),
            _ => return None,
        })
    }

    /// Applies options with commas between them.
    pub fn apply_all(&mut self, text: &str) -> Result<(), String> {
        for (name, value) in parts(text) {
            self.apply(name, value)
                .unwrap_or_else(|| Err(format!("{name:?} is no option of a port; there are {OPTIONS}")))?;
        }
        Ok(())
    }
}

impl GroupSpec {
    /// Applies options with commas between them.
    pub fn apply_all(&mut self, text: &str) -> Result<(), String> {
        for (name, value) in parts(text) {
            limit(&mut self.up, &mut self.down, &mut self.share, name, value)
                .unwrap_or_else(|| {
                    Err(format!("there is no such option of a group; there are {GROUP_OPTIONS}"))
                })
                .map_err(|why| format!("{name}: {why}"))?;
        }
        Ok(())
    }
}

fn parts(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let options = text.split(',').filter(|option| !option.is_empty());
    options.map(|option| option.split_once('=').unwrap_or((option, "")))
}

/// Applies an option of limits; `None` if it is none.
fn limit(
    up: &mut Option<Limit>,
    down: &mut Option<Limit>,
    share: &mut ShareSpec,
    name: &str,
    value: &str,
) -> Option<Result<(), String>> {
    let none = matches!(value, "none" | "off");
    let set = |limit: &mut Option<Limit>| {
        *limit = if none {
            None
        } else {
            let bits_per_second = rate(value)?;
            let (burst_bytes, frames_per_second) =
                limit.map_or((None, None), |old| (old.burst_bytes, old.frames_per_second));
            Some(Limit { bits_per_second, burst_bytes, frames_per_second })
        };
        Ok(())
    };
    let promise = || if none { Ok(None) } else { rate(value).map(Some) };
    Some(match name {
        "rate" => set(up).and_then(|()| set(down)),
        "up" => set(up),
        "down" => set(down),
        "burst" | "pps" if up.is_none() && down.is_none() => {
            Err("of which limit? say rate=, up= or down= first".to_owned())
        }
        "burst" => count(value).map(|count| {
            up.iter_mut().chain(down).for_each(|limit| limit.burst_bytes = Some(count));
        }),
        "pps" => count(value).map(|count| {
            up.iter_mut().chain(down).for_each(|limit| limit.frames_per_second = Some(count));
        }),
        "weight" if none => {
            share.weight = None;
            Ok(())
        }
        "weight" => value
            .parse()
            .ok()
            .filter(|weight| (1..=WEIGHT_MAX).contains(weight))
            .map(|weight| share.weight = Some(weight))
            .ok_or_else(|| format!("{value:?}: 1 to {WEIGHT_MAX}")),
        "min" => promise().map(|bits| (share.min_up, share.min_down) = (bits, bits)),
        "min-up" => promise().map(|bits| share.min_up = bits),
        "min-down" => promise().map(|bits| share.min_down = bits),
        _ => return None,
    })
}

#[cfg(test)]
mod test {
    use super::*;

    fn spec(text: &str) -> Result<PortSpec, String> {
        let mut spec = PortSpec::default();
        spec.apply_all(text).map(|()| spec)
    }

    #[test]
    fn options_read_as_people_write_them() {
        let all = spec("trunk=5-9,native=1,service-tags,mac=02:00:00:00:00:01+02:00:00:00:00:02,ip=10.0.0.1+fd00::1,private,up=10M,down=2.5G,burst=64k,loss=0.5%,delay=20ms,jitter=200us").unwrap();
        assert_eq!(all.vlans.to_string(), "trunk 5-9, native 1, service tags");
        assert_eq!((all.macs.len(), all.addresses.len(), all.private), (2, 2, true));
        assert_eq!(
            (all.up.unwrap().bits_per_second, all.down.unwrap().bits_per_second),
            (10_000_000, 2_500_000_000)
        );
        assert_eq!(all.up.unwrap().burst_bytes, Some(64_000));
        let Emulation { loss_ppm, delay_us, jitter_us, .. } = all.emulation;
        assert_eq!((loss_ppm, delay_us, jitter_us), (5000, 20_000, 200));
        let mut back: PortSpec = serde_json::from_str(&serde_json::to_string(&all).unwrap()).unwrap();
        assert_eq!(back, all);
        back.apply_all("vlan=3,private=off,up=none,down=none,delay=0,jitter=0,loss=0,mac=none,ip=none")
            .unwrap();
        assert_eq!(back, spec("vlan=3").unwrap());
    }

    #[test]
    fn groups_have_limits_too() {
        let mut group = GroupSpec::default();
        group.apply_all("up=10M,down=1G,burst=64k,weight=3,min-down=100M").unwrap();
        assert_eq!(group.up.unwrap().burst_bytes, Some(64_000));
        assert_eq!(group.share, ShareSpec { weight: Some(3), min_up: None, min_down: Some(100_000_000) });
        let spec = spec("group=gold,weight=5,min=1M").unwrap();
        assert_eq!(
            (spec.group.as_deref(), spec.share.weight, spec.share.min_up),
            (Some("gold"), Some(5), Some(1_000_000))
        );
        group.apply_all("rate=none,weight=off,min=none").unwrap();
        assert_eq!(group, GroupSpec::default());
        for bad in ["weight=0", "weight=1001", "vlan=5", "min=x", "burst=1k"] {
            assert!(GroupSpec::default().apply_all(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            "group=",
            "weight=-1",
            "vlan=0",
            "vlan=4095",
            "native=5",
            "trunk=9-5",
            "priority=8",
            "mac=01:00:00:00:00:00",
            "ip=10.0.0",
            "up=0",
            "up=10X",
            "burst=5",
            "loss=101",
            "delay=-1",
            "trust=maybe",
            "color=red",
            "storm=0",
        ] {
            assert!(spec(bad).is_err(), "{bad}");
        }
    }
}
