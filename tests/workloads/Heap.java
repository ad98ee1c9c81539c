// A JVM program: threads, a heap that is checked whole, collections, locks, timed waits, memory outside the heap.
// java Heap DIRECTORY. Compiled methods, parked threads and dropped pages must all come through.
import java.nio.ByteBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import java.util.concurrent.locks.LockSupport;
import java.util.zip.CRC32;

public class Heap {
    static Path directory;
    static volatile String mark = "none";
    static final AtomicLong rounds = new AtomicLong();

    static void bad(String text) {
        System.out.println("BAD " + text);
        System.out.flush();
        Runtime.getRuntime().halt(1);
    }

    static final class Block {
        final byte[] data;
        final long sum;

        Block(Random random, int size) {
            data = new byte[size];
            for (byte value : data) if (value != 0) bad("fresh memory is not zero");
            random.nextBytes(data);
            sum = checksum();
        }

        long checksum() {
            CRC32 crc = new CRC32();
            crc.update(data);
            return crc.getValue();
        }

        void check() {
            if (checksum() != sum) bad("a block of " + data.length + " bytes changed");
        }
    }

    static boolean go() {
        return Files.exists(directory.resolve("go"));
    }

    static void churn(int number) {
        Random random = new Random(number);
        Block[] blocks = new Block[300];
        for (int after = 0; after < 20; ) {
            for (int step = 0; step < 200; step++) {
                int at = random.nextInt(blocks.length);
                if (blocks[at] != null) blocks[at].check();
                blocks[at] = random.nextInt(3) > 0 ? new Block(random, 1 + random.nextInt(20000)) : null;
            }
            rounds.incrementAndGet();
            if (go()) after++;
            else if (Files.exists(directory.resolve("calm"))) LockSupport.parkNanos(100_000_000L);
        }
        for (Block one : blocks) if (one != null) one.check();
    }

    public static void main(String[] arguments) throws Exception {
        directory = Path.of(arguments[0]);
        List<Thread> threads = new ArrayList<>();
        for (int number = 0; number < 3; number++) {
            int own = number;
            threads.add(new Thread(() -> churn(own), "churn-" + number));
        }
        LinkedBlockingQueue<Integer> there = new LinkedBlockingQueue<>(10);
        LinkedBlockingQueue<Integer> back = new LinkedBlockingQueue<>(10);
        Thread echo = new Thread(() -> {
            try {
                while (true) back.put(there.take() + 1);
            } catch (InterruptedException end) {
                return;
            }
        });
        echo.setDaemon(true);
        echo.start();
        ScheduledExecutorService timers = Executors.newScheduledThreadPool(2);
        AtomicInteger ticks = new AtomicInteger();
        timers.scheduleAtFixedRate(ticks::incrementAndGet, 10, 10, TimeUnit.MILLISECONDS);
        ByteBuffer outside = ByteBuffer.allocateDirect(8 << 20);
        Random random = new Random(99);
        byte[] copy = new byte[8 << 20];
        random.nextBytes(copy);
        outside.put(copy);
        ConcurrentHashMap<Integer, String> map = new ConcurrentHashMap<>();
        for (int i = 0; i < 20000; i++) map.put(i, Integer.toString(i * 7));
        for (Thread thread : threads) thread.start();
        while (rounds.get() < 10) Thread.sleep(10);
        System.out.println("READY");
        int value = 0;
        int before = ticks.get();
        while (!go()) {
            there.put(value);
            int got = back.take();
            if (got != ++value) bad("the queue gave " + got + " instead of " + value);
            Path wanted = directory.resolve("mark");
            if (Files.exists(wanted)) {
                String word = Files.readString(wanted).strip();
                if (!word.isEmpty() && !word.equals(mark)) {
                    mark = word;
                    Files.writeString(directory.resolve("seen"), mark + "\n");
                }
            }
            Thread.sleep(5);
            if (value % 200 == 0) System.gc();
        }
        for (Thread thread : threads) thread.join();
        for (int i = 0; i < 20000; i++) if (!map.get(i).equals(Integer.toString(i * 7))) bad("map entry " + i);
        for (int i = 0; i < copy.length; i++) if (outside.get(i) != copy[i]) bad("outside the heap, byte " + i);
        if (ticks.get() <= before) bad("timers stand still");
        System.out.println("MARK " + mark);
        System.out.println("OK");
        System.exit(0);
    }
}
