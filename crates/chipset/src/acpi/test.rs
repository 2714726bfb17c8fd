//! The tables as a kernel reads them, and as ACPICA's `iasl` judges them.

use super::*;
use std::collections::BTreeMap;
use std::process::Command;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

/// Follows the pointers from the RSDP, checking every checksum.
fn walk(tables: &Tables) -> BTreeMap<String, Vec<u8>> {
    let at = |address: u64| {
        let start = usize::try_from(address - tables.base).unwrap();
        let len = u32_at(&tables.bytes, start + 4) as usize;
        tables.bytes[start..start + len].to_vec()
    };
    assert_eq!(&tables.bytes[..8], b"RSD PTR ");
    assert_eq!((sum(&tables.bytes[..20]), sum(&tables.bytes[..36])), (0, 0));
    let xsdt = at(u64_at(&tables.bytes, 24));
    let mut found = BTreeMap::new();
    for entry in xsdt[36..].chunks(8) {
        let table = at(u64_at(entry, 0));
        assert_eq!(sum(&table), 0);
        found.insert(String::from_utf8(table[..4].to_vec()).unwrap(), table);
    }
    let fadt = found["FACP"].clone();
    assert_eq!(u64::from(u32_at(&fadt, 40)), u64_at(&fadt, 140), "both DSDT pointers");
    let facs = u64::from(u32_at(&fadt, 36));
    assert_eq!(facs % 64, 0);
    found.insert("FACS".into(), at(facs));
    found.insert("DSDT".into(), at(u64_at(&fadt, 140)));
    assert_eq!((sum(&xsdt), sum(&found["DSDT"])), (0, 0));
    found.insert("XSDT".into(), xsdt);
    found
}

#[test]
fn pointers_and_checksums_hold() {
    let tables = build(&Board::pc(2), board::ACPI_TABLES);
    let found = walk(&tables);
    let names: Vec<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(names, ["APIC", "DSDT", "FACP", "FACS", "MCFG", "WAET", "XSDT"]);
    let fadt = &found["FACP"];
    assert_eq!(fadt.len(), 276);
    assert_eq!(u32_at(fadt, 56), 0x600);
    assert_eq!(u32_at(fadt, 76), 0x608);
    assert_eq!(fadt[108], 0x32, "century");
    assert_eq!((u64_at(fadt, 120), fadt[128]), (0xcf9, 6));
    assert_eq!(u64_at(&found["MCFG"], 44), 0xe000_0000);
}

#[test]
fn madt_lists_processors_of_both_kinds() {
    for vcpus in [1u32, 4, 255, 300, 1024] {
        let tables = build(&Board::pc(vcpus), board::ACPI_TABLES);
        assert!(tables.base + (tables.bytes.len() as u64) < 0x10_0000, "they end below the first mebibyte");
        assert!(board::ACPI_TABLES + (tables.bytes.len() as u64) < 0x10_0000, "below 1 MiB");
        let madt = &walk(&tables)["APIC"];
        let mut at = 44;
        let mut ids = vec![];
        let mut kinds = BTreeMap::<u8, usize>::new();
        while at < madt.len() {
            match madt[at] {
                0 => ids.push(u32::from(madt[at + 3])),
                9 => ids.push(u32_at(madt, at + 4)),
                _ => {}
            }
            *kinds.entry(madt[at]).or_default() += 1;
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(at, madt.len());
        assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
        assert_eq!((kinds[&1], kinds[&2], kinds[&4]), (1, 2, 1));
    }
}

/// Two nodes of two processors with memory on both sides of the hole, and one of memory alone, far away.
fn nodes() -> Vec<board::Node> {
    let node = |cpus: &[u32], memory: &[(u64, u64)], distances: [u8; 3]| board::Node {
        cpus: cpus.to_vec(),
        memory: memory.to_vec(),
        distances: distances.to_vec(),
        latency_ns: Some(90),
        bandwidth_mb_s: Some(120_000),
    };
    let far = board::Node { latency_ns: Some(300), ..node(&[], &[(6 << 30, 1 << 30)], [20, 30, 10]) };
    vec![
        node(&[0, 1], &[(0, 2 << 30)], [10, 21, 20]),
        node(&[2, 300], &[(2 << 30, 1 << 30), (4 << 30, 2 << 30)], [21, 10, 30]),
        far,
    ]
}

#[test]
fn nodes_are_told_with_their_processors_memory_and_distances() {
    let board = Board { nodes: nodes(), ..Board::pc(301) };
    let found = walk(&build(&board, board::ACPI_TABLES));
    let srat = &found["SRAT"];
    let (mut at, mut cpus, mut memory) = (48, vec![], vec![]);
    while at < srat.len() {
        let structure = &srat[at..];
        match structure[0] {
            0 => cpus.push((structure[2].into(), structure[3].into(), u32_at(structure, 4))),
            1 => memory.push((u32_at(structure, 2), u64_at(structure, 8), u64_at(structure, 16))),
            2 => cpus.push((u32_at(structure, 4), u32_at(structure, 8), u32_at(structure, 12))),
            kind => panic!("{kind}"),
        }
        at += usize::from(structure[1]);
    }
    assert_eq!(at, srat.len());
    assert_eq!(cpus, [(0, 0, 1), (0, 1, 1), (1, 2, 1), (1, 300, 1)]);
    assert_eq!(
        memory,
        [(0, 0, 2 << 30), (1, 2 << 30, 1 << 30), (1, 4 << 30, 2 << 30), (2, 6 << 30, 1 << 30)]
    );
    let slit = &found["SLIT"];
    assert_eq!(u64_at(slit, 36), 3);
    assert_eq!(slit[44..], [10, 21, 20, 21, 10, 30, 20, 30, 10]);
    // HMAT: three times who is nearest, latencies, bandwidths (two who ask, three who are asked).
    let hmat = &found["HMAT"];
    let nearest: Vec<_> = (0..3).map(|node| u32_at(hmat, 40 + node * 40 + 12)).collect();
    assert_eq!(nearest, [0, 1, 0], "the far memory's processors are those of the nearer node");
    let matrix = |at: usize| {
        let head = 32 + 4 * 2 + 4 * 3;
        let unit = u64_at(hmat, at + 24);
        let entry = |pair: usize| u16::from_le_bytes(hmat[at + head + pair * 2..][..2].try_into().unwrap());
        (hmat[at + 9], (0..6).map(|pair| u64::from(entry(pair)) * unit).collect::<Vec<_>>(), head + 12)
    };
    let (kind, latencies, len) = matrix(160);
    assert_eq!(
        (kind, latencies),
        (0, vec![90_000, 189_000, 300_000, 189_000, 90_000, 450_000]),
        "picoseconds"
    );
    let (kind, bandwidths, last) = matrix(160 + len);
    assert_eq!((kind, bandwidths), (3, vec![120_000, 57_140, 120_000, 57_140, 120_000, 80_000]), "MB/s");
    assert_eq!(160 + len + last, hmat.len());
}

#[test]
fn a_board_without_nodes_or_without_speeds_says_nothing_of_them() {
    let mut board = Board { nodes: nodes(), ..Board::pc(301) };
    for node in &mut board.nodes {
        (node.latency_ns, node.bandwidth_mb_s) = (None, None);
    }
    let found = walk(&build(&board, board::ACPI_TABLES));
    assert!(found.contains_key("SLIT") && !found.contains_key("HMAT"));
    assert!(!walk(&build(&Board::pc(1), board::ACPI_TABLES)).contains_key("SRAT"));
}

/// Disassembles every table and compiles the DSDT again; skipped where ACPICA is not installed.
#[test]
fn iasl_has_no_complaints() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: no iasl here (Debian package acpica-tools)");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut board = Board::pc(300);
    board.serial.push(board::SerialPort { port: 0x3e8, irq: 5 });
    board.nodes = nodes();
    for (name, table) in walk(&build(&board, board::ACPI_TABLES)) {
        let path = directory.path().join(format!("{name}.aml"));
        std::fs::write(&path, table).unwrap();
        let source = path.with_extension("dsl");
        let mut steps = vec![vec!["-d".into(), path.clone()]];
        if name == "DSDT" {
            steps.push(vec!["-f".into(), "-ve".into(), source.clone()]);
            steps.push(vec![source.clone()]);
        } else if name != "FACS" && name != "XSDT" {
            steps.push(vec![source.clone()]);
        }
        for step in steps {
            let output = Command::new("iasl").args(&step).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}: iasl {step:?}: {said}");
            for bad in ["Error  ", "Warning  ", "Could not", "Invalid", "invalid", "Unknown", "corrupt"] {
                assert!(!said.contains(bad), "{name}: iasl {step:?}: {said}");
            }
            if let Some(line) = said.lines().find(|line| line.starts_with("Compilation")) {
                assert!(line.contains(" 0 Errors, 0 Warnings"), "{name}: {said}");
            }
        }
        let source = std::fs::read_to_string(&source).unwrap();
        assert!(!source.contains("Invalid"), "{name}: {source}");
    }
}
