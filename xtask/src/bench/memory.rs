//! What a running yado takes of the host's memory, by what it is for (`/proc/PID/smaps`, proc_pid_smaps(5)).

use anyhow::Context;
use std::fmt::Write;

/// Proportional set sizes of one process, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Guest RAM that the guest has touched.
    pub guest: u64,
    /// Translated code.
    pub code: u64,
    /// yado's program and the host's libraries.
    pub program: u64,
    /// Everything else: heap, stacks, tables.
    pub heap: u64,
}

impl Usage {
    /// Of the process `id`, whose guest has RAM in mappings of `ram` bytes.
    pub fn of(id: u32, ram: u64) -> anyhow::Result<Self> {
        let path = format!("/proc/{id}/smaps");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Ok(Self::parse(&text, ram))
    }

    fn parse(text: &str, ram: u64) -> Self {
        let mut usage = Self::default();
        let (mut size, mut name) = (0, "");
        for line in text.lines() {
            if let Some((mapping, of)) = header(line) {
                (size, name) = (mapping, of);
            } else if let Some(kib) =
                line.strip_prefix("Pss:").and_then(|rest| rest.split_whitespace().next())
            {
                *usage.part(size, name, ram) += kib.parse::<u64>().unwrap_or(0);
            }
        }
        usage
    }

    fn part(&mut self, size: u64, name: &str, ram: u64) -> &mut u64 {
        match name {
            "" if size == ram => &mut self.guest,
            _ if name.starts_with("/memfd:yado-ram") => &mut self.guest,
            // Shared memory without a file.
            _ if name.starts_with("/memfd:yado-") || name == "/dev/zero" => &mut self.code,
            _ if name.starts_with('/') => &mut self.program,
            _ => &mut self.heap,
        }
    }

    /// What is neither the guest's RAM nor translated code.
    pub fn overhead(self) -> u64 {
        self.program + self.heap
    }

    /// A table for a page.
    pub fn table(self) -> String {
        let mut text = String::from("| memory of the host, by use | MiB |\n|---|---|\n");
        for (what, kib) in [
            ("guest RAM that the guest has touched", self.guest),
            ("translated code", self.code),
            ("program and libraries", self.program),
            ("heap, stacks, tables", self.heap),
            ("**beside guest RAM and translated code**", self.overhead()),
        ] {
            let _ = writeln!(text, "| {what} | {:.1} |", kib as f64 / 1024.0);
        }
        text
    }
}

/// Size in bytes and name of the mapping that a line begins, if it begins one.
fn header(line: &str) -> Option<(u64, &str)> {
    let mut words = line.split_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let size = u64::from_str_radix(to, 16).ok()?.checked_sub(u64::from_str_radix(from, 16).ok()?)?;
    // Rights, offset, device, inode, name.
    Some((size, words.nth(4).unwrap_or("")))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn mappings_are_told_apart() {
        let text = "\
55d0-65d0 r-xp 00000000 fe:00 12    /usr/bin/yado\nRss: 9 kB\nPss:                   4 kB\nPss_Dirty: 3 kB\n\
7fb0000000-7fb0100000 rw-p 00000000 00:00 0 \nPss:                 100 kB\n\
7fb0200000-7fb0201000 rw-p 00000000 00:00 0 \nPss:                  10 kB\n\
7fb0300000-7fb0400000 rw-s 00000000 00:01 13874    /dev/zero (deleted)\nPss:  50 kB\n\
7fb0500000-7fb0510000 rw-s 00000000 00:01 13875    /memfd:yado-ram (deleted)\nPss:  7 kB\n\
7ffc000000-7ffc001000 rw-p 00000000 00:00 0    [stack]\nPss:   1 kB\nVmFlags: rd wr\n";
        let usage = Usage::parse(text, 0x10_0000);
        assert_eq!(usage, Usage { guest: 107, code: 50, program: 4, heap: 11 });
        assert_eq!(usage.overhead(), 15);
        let own = Usage::of(std::process::id(), 0).unwrap();
        assert!(own.program > 0 && own.heap > 0, "{own:?}");
    }
}
