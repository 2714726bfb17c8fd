//! Random trees: e2fsck must find nothing, and `debugfs rdump` must give back exactly what was put in.

mod oracle;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ext4::{DeviceKind, Metadata, Options, Writer};
use oracle::{assert_clean, dump, scratch};
use proptest::prelude::*;

/// One call of the writer. Paths are chosen so that the model below stays simple: directories are named `d...`, files
/// `f...` and symbolic links `l...`.
#[derive(Debug, Clone)]
enum Step {
    Directory(Vec<u8>),
    File(Vec<u8>, Vec<(bool, u32)>, u8),
    Symlink(Vec<u8>, usize),
    HardLink(Vec<u8>, usize),
    Many(Vec<u8>, u16, u8),
}

#[derive(Debug, Clone, PartialEq)]
enum Content {
    File(Vec<u8>),
    Symlink(Vec<u8>),
}

fn name(letter: char) -> impl Strategy<Value = String> {
    let short = "[a-c]{1,2}".prop_map(|name| name.to_string());
    let long = (200_usize..=254, "[a-z]").prop_map(|(length, letter)| letter.repeat(length));
    prop_oneof![9 => short, 1 => long].prop_map(move |name| format!("{letter}{name}"))
}

fn path(letter: char) -> impl Strategy<Value = Vec<u8>> {
    let parents = prop_oneof![
        9 => proptest::collection::vec(name('d'), 0..4),
        1 => proptest::collection::vec("d[ab]".prop_map(String::from), 20..60),
    ];
    (parents, name(letter)).prop_map(|(parents, name)| {
        let mut path: String = parents.iter().map(|parent| format!("/{parent}")).collect();
        path.push('/');
        path.push_str(&name);
        path.into_bytes()
    })
}

fn step() -> impl Strategy<Value = Step> {
    // Pieces of content: data or zeros, and how long.
    let pieces = proptest::collection::vec((any::<bool>(), prop_oneof![0_u32..200, 0_u32..40_000]), 0..6);
    let large = (1_u32..4, 20_000_u32..30_000)
        .prop_map(|(count, length)| (0..count * 40).map(|piece| (piece % 2 == 0, length)).collect());
    prop_oneof![
        4 => path('d').prop_map(Step::Directory),
        12 => (path('f'), prop_oneof![12 => pieces, 1 => large], any::<u8>())
            .prop_map(|(path, pieces, salt)| Step::File(path, pieces, salt)),
        3 => (path('l'), 1_usize..200).prop_map(|(path, length)| Step::Symlink(path, length)),
        3 => (path('f'), any::<usize>()).prop_map(|(path, which)| Step::HardLink(path, which)),
        1 => (path('d'), 100_u16..5000, 1_u8..200).prop_map(|(path, count, width)| Step::Many(path, count, width)),
    ]
}

fn bytes(pieces: &[(bool, u32)], salt: u8) -> Vec<u8> {
    let mut content = Vec::new();
    for &(data, length) in pieces {
        for position in 0..length {
            content.push(if data { (position as u8).wrapping_mul(31) ^ salt | 1 } else { 0 });
        }
    }
    content
}

/// Gives its bytes in small odd portions, as a decompressor does.
struct Portions<'a>(&'a [u8]);

impl Read for Portions<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = buffer.len().min(self.0.len()).min(1013);
        let (now, later) = self.0.split_at(length);
        buffer[..length].copy_from_slice(now);
        self.0 = later;
        Ok(length)
    }
}

/// Makes the image, and says what must be in it.
fn apply(steps: &[Step], writer: &mut Writer<File>) -> BTreeMap<Vec<u8>, Content> {
    let meta = Metadata::new(0o755, 1_700_000_000);
    let mut model = BTreeMap::new();
    for step in steps {
        match step {
            Step::Directory(path) => writer.directory(path, &meta).unwrap(),
            Step::File(path, pieces, salt) => {
                let content = bytes(pieces, *salt);
                writer.file(path, &meta, content.len() as u64, Portions(&content)).unwrap();
                model.insert(path.clone(), Content::File(content));
            }
            Step::Symlink(path, length) => {
                let target = vec![b'x'; *length];
                writer.symlink(path, &meta, &target).unwrap();
                model.insert(path.clone(), Content::Symlink(target));
            }
            Step::HardLink(path, which) => {
                let files: Vec<&Vec<u8>> = model.keys().collect();
                let Some(existing) = files.get(which % files.len().max(1)).map(|path| path.to_vec()) else {
                    continue;
                };
                writer.hard_link(path, &existing).unwrap();
                model.insert(path.clone(), model[&existing].clone());
            }
            Step::Many(path, count, width) => {
                for number in 0..*count {
                    let mut path = path.clone();
                    path.extend(format!("/f{number:0>width$}", width = usize::from(*width)).bytes());
                    writer.file(&path, &meta, 0, std::io::empty()).unwrap();
                    model.insert(path, Content::File(Vec::new()));
                }
            }
        }
    }
    model
}

fn read_back(root: &Path, at: &Path, found: &mut BTreeMap<Vec<u8>, Content>) {
    for entry in fs::read_dir(at).unwrap() {
        let path = entry.unwrap().path();
        let file_type = fs::symlink_metadata(&path).unwrap().file_type();
        let mut name = b"/".to_vec();
        name.extend(path.strip_prefix(root).unwrap().as_os_str().as_bytes());
        if file_type.is_dir() {
            read_back(root, &path, found);
        } else if file_type.is_symlink() {
            found.insert(
                name,
                Content::Symlink(fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()),
            );
        } else {
            found.insert(name, Content::File(fs::read(&path).unwrap()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn hostile_paths_are_refused_or_taken_and_the_image_stays_clean(
        calls in proptest::collection::vec((0_u8..6, "[./ab]{0,12}", "[./ab]{0,12}"), 0..400),
        odd in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let directory = scratch();
        let image = directory.path().join("image");
        let mut writer = Writer::new(File::create(&image).unwrap(), &Options::new(8 << 20)).unwrap();
        let meta = Metadata::new(0o755, 0);
        let odd = [(1_u8, odd.clone(), Vec::new()), (2, b"/o".to_vec(), odd)];
        let calls = calls.into_iter().map(|(call, path, other)| (call, path.into_bytes(), other.into_bytes()));
        for (call, path, other) in calls.chain(odd) {
            // Any of them may fail; what matters is what they leave.
            let _ = match call {
                0 => writer.directory(&path, &meta),
                1 => writer.file(&path, &meta, other.len() as u64, other.as_slice()),
                2 | 3 => writer.symlink(&path, &meta, &other),
                4 => writer.hard_link(&path, &other),
                _ => writer.device(&path, &meta, DeviceKind::Fifo, 0, 0),
            };
        }
        writer.finish().unwrap();
        assert_clean(&image);
    }

    #[test]
    fn any_size_is_clean(mebibytes in 1_u64..3000, bytes in 0_u64..1 << 20, names in 0_u32..300) {
        let directory = scratch();
        let image = directory.path().join("image");
        let options = Options::new((mebibytes << 20) + bytes);
        let mut writer = Writer::new(File::create(&image).unwrap(), &options).unwrap();
        for number in 0..names.min(mebibytes as u32 * 30) {
            let path = format!("/{number:0>80}");
            writer.file(path.as_bytes(), &Metadata::new(0o644, 0), 2, &b"hi"[..]).unwrap();
        }
        writer.finish().unwrap();
        assert_clean(&image);
    }

    #[test]
    fn what_goes_in_comes_out(steps in proptest::collection::vec(step(), 0..60)) {
        let directory = scratch();
        let image = directory.path().join("image");
        let out = directory.path().join("out");
        fs::create_dir(&out).unwrap();
        let options = Options { hash_seed: *b"a seed of a hash", ..Options::new(400 << 20) };
        let mut writer = Writer::new(File::create(&image).unwrap(), &options).unwrap();
        let model = apply(&steps, &mut writer);
        writer.finish().unwrap();
        assert_clean(&image);
        dump(&image, &out);
        let mut found = BTreeMap::new();
        read_back(&out, &out, &mut found);
        prop_assert!(found.keys().eq(model.keys()), "other names");
        for (name, content) in &model {
            prop_assert!(&found[name] == content, "{} differs", String::from_utf8_lossy(name));
        }
    }
}
