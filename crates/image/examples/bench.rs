//! How many requests a second an image serves, by itself:
//! `cargo run --release -p image --example bench -- FILE FORMAT read|write THREADS COUNT [STEP]`.
//!
//! Requests of 4 KiB go over the disk in steps of STEP bytes (default 7 MiB and 4 KiB, as `qemu-img bench -S` would), and
//! around again; each thread takes every THREADSth.

use image::{Image, OpenOptions, ReadInto, WriteFrom};
use std::path::Path;
use std::time::Instant;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [file, format, action, threads, count, rest @ ..] = &arguments[..] else {
        eprintln!("bench FILE FORMAT read|write THREADS COUNT [STEP]");
        std::process::exit(2);
    };
    let number = |text: &String| text.parse::<u64>().expect("a number");
    let (threads, count) = (number(threads), number(count));
    let step = rest.first().map_or((7 << 20) + 4096, number);
    let writes = action == "write";
    let format = Some(format.parse().expect("a format"));
    let how = OpenOptions { format, read_only: !writes, ..OpenOptions::default() };
    let image = Image::open(Path::new(file), how).expect("an image");
    let disk = image.disk.as_ref();
    let room = disk.capacity() - 4096;
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut buffer = [7; 4096];
                let mut done = thread;
                while done < count {
                    let at = (done * step) % room / 4096 * 4096;
                    if writes {
                        disk.write(at, &WriteFrom(&buffer)).expect("written");
                    } else {
                        disk.read(at, &ReadInto::new(&mut buffer)).expect("read");
                    }
                    done += threads;
                }
            });
        }
    });
    let seconds = began.elapsed().as_secs_f64();
    println!("{:.1} k requests/s ({seconds:.3} s)", count as f64 / seconds / 1000.0);
    image.close().expect("closed");
}
